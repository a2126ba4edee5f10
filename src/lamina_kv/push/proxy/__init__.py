"""The rendezvous: chooses a prefill and a decode engine for every request and tells each which push
it is part of. Only addresses pass through it; announcements and bytes go from engine to engine.

==================  ============================================================================
``app.py``          which routes are there, and what lives as long as the server?
``relay.py``        who is let in, and what becomes of the client's connection?
``requests.py``     what is each engine sent of a request?
``splits.py``       which APIs are split between two engines, and how is each asked?
``headers.py``      which headers pass between clients and engines?
``dispatcher.py``   which engines are asked, in which order, until one answers?
``withdrawals.py``  who is told of prompts that were computed for nobody?
``blame.py``        is a failed request the engine's mistake or the client's?
``usage.py``        how many tokens did an answer take, and which were cached?
``routing/``        which engines suit a request?
``fleet.py``        which engines are there now, and which of them are drained or leave?
``discovery/``      where are engines found?
``engines.py``      is an engine well, and how is it reached?
``exchanges.py``    how is an engine spoken to?
``breaker.py``      for how long is an engine left alone that fails?
``reports.py``      what does an engine publish of itself?
``roster.py``       what is said of engines in the log?
``admin.py``        what may operators ask?
``memory.py``       how much may all requests hold?
``journal.py``      what does the access log say?
``metrics.py``      what is published?
``tls.py``          whose certificates are believed?
``settings.py``     what is the proxy told at its start?
``errors.py``       what does it answer itself?
==================  ============================================================================
"""
