"""The type of a job's argument that names another stage."""


class Source(str):
    """The name of an earlier stage of the recipe, or the path of a folder with a checkpoint.

    In a recipe the name is replaced by the stage's folder before a job sees it.
    """

    __slots__ = ()
