"""Stand-ins for engines, and a proxy in front of them, over real HTTP on this machine."""
