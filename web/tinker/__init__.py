"""The protocol of the Tinker SDK under /api/v1, translated to the journal entries of the native API.

Another's protocol, so it is not in the OpenAPI document: docs/tinker.md says what of it is served.
"""
