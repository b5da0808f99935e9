"""Models of transformers decoded by their own forward, in the loop that swathe's models have.

stock.py     what that loop asks of a model, answered by one of transformers'
cache.py     a cache of fixed room and addresses for it, whatever its layers see
replay.py    whether a step is the same calls on the same memory each time: then it is captured
"""
