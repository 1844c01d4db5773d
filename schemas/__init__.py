"""The wire contract: the only place where a field of the API is named.

`errors` is the table of error codes; the other modules hold marshmallow schemas, one module per noun.
Nothing here imports Flask, Redis or SQL.
"""
