"""What schemathesis cannot know by itself of this API: how NDJSON is written."""

import json

import schemathesis


@schemathesis.serializer("application/x-ndjson")
def ndjson(ctx, value):
    """One line. What is no message at all is sent as it is, so that the server has something to refuse."""
    if isinstance(value, bytes):
        return value
    return json.dumps(value).encode() + b"\n"
