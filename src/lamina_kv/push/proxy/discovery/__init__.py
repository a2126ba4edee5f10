"""Where engines are, when that changes while the proxy runs.

==================  ==========================================================================
``places.py``       what is known of one engine before it is asked anything?
``listing.py``      what does the file of ``--engines`` say, and what is wrong with it?
``names.py``        which addresses does a name of DNS have?
``kubernetes.py``   which pods does a Service have?
``watch.py``        what do the file and all that it names say together, now?
==================  ==========================================================================
"""
