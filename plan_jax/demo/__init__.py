"""A page in the browser: where phrases are in a film, and which films and reports are alike.

`python -m plan_jax.demo` is the command, and `show` the page inside a notebook. `grounder` keeps
the model, `uploads` checks files, `library` and `index` are for retrieval, `pictures`, `render` and
`downloads` turn results into what a browser shows, and only `page` knows gradio.
"""

from collections.abc import Sequence
from typing import Any


def show(model: str = "phantom-plan", films: Sequence[str] = (), height: int = 900) -> Any:
    """Shows the page below a cell of Colab or Jupyter; returns it, with a method `close`.

    The page is that of a server in this kernel, which only this machine can reach.

    Args:
      model: what `plan_jax.load` takes.
      films: folders of films, or tables of films and reports, for retrieval.
      height: of the page, in pixels.

    Raises:
      UserError: gradio is not installed, there is no such model, or no film.
    """
    from plan_jax.demo import server  # imported late: JAX takes seconds

    return server.launch(model, films, height=height, inline=True)
