"""The code that a result depends on: hashes of classes and functions that are not part of an installed distribution.

Of a definition everything counts that it uses, through any number of modules of the same kind: the definitions that it
names, what they name, and what a module does when it is imported. What is read is the syntax tree, so comments, blank
lines and docstrings do not count. Names that are only found when the code runs, such as in ``getattr`` or on an object
that is handed in, are not followed; where code reads ``globals()`` or evaluates text, all of its module counts.

An installed distribution is known by its version, which records keep (:func:`workbench.records.versions`). So are this
project's packages, also where they are installed editable: developing them does not invalidate what they made.
"""

from workbench.definitions.bytecode import code_of
from workbench.definitions.modules import module_source
from workbench.definitions.reader import Hashes, definitions, definitions_of, difference

__all__ = ["Hashes", "code_of", "definitions", "definitions_of", "difference", "module_source"]
