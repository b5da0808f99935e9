"""Patching of transformers models in place: find by structure, prove by numbers, swap, undo.

patch.py      patch, unpatch, patched: the public calls, and the list of finders
options.py    what a user may ask for
report.py     Candidate and Proof (what finders hand over), Row and Report (what users read)
swaps.py      what a patch may change on a model, and how all of it is put back
symbolic.py   a forward, run on symbols, as one canonical expression
prove.py      a fused forward against the module's own, beside both in fp64
norms.py ...  the finders, one file for each form
sources.py    a function's source as a tree and back; rewriting.py and delaying.py change it
rebinding.py  a forward over other globals, inside the decorators that it has
"""
