"""The command ``lamina``: every verb is a module here, imported when it is called."""
