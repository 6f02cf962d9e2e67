"""The version, once: the package, its metadata and the name given to servers read it
here.
"""

__version__ = "0.1.0"
