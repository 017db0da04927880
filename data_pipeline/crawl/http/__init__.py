"""HTTP/1.1 as a crawler needs it: one GET at a time, bounded in every direction, to vetted addresses alone.

get            one request
connection     connections, kept for the next request; one exchange on each
rests          when a response that comes in crumbs is read again
message        a response as it comes off the wire
body           codings undone within a bound; is it HTML?
"""
