"""The rendezvous: chooses a prefill and a decode engine for every request and tells each which push
it is part of. Only addresses pass through it; announcements and bytes go from engine to engine."""
