"""What every component shares and none owns: messages, sampling, block hashes, text, logs.

Nothing here imports torch, so the gateway and the operator may use all of it.
"""
