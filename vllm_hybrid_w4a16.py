# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Bootstrap of the overlay: makes our modules importable at their in-tree names.

Our files lie in a folder ``vllm`` beside this file: in the installed ``vllm`` package
itself when a regular vLLM shares our site-packages, elsewhere when vLLM or this project
is installed in editable mode. In the second case each vLLM package that has a
counterpart in our folder gets that counterpart appended to its ``__path__``; vLLM's own
folder stays first, so that nothing of vLLM's can be shadowed.

``vllm_hybrid_w4a16.pth`` runs this when Python starts, hence only ``os`` and ``sys``
are imported here. The ``vllm.general_plugins`` entry point names ``register``,
the command ``vllm-hybrid-w4a16`` is ``main``.
"""

import os
import sys

_ROOT = os.path.join(os.path.dirname(os.path.realpath(__file__)), "vllm")


class _PathExtender:
    """Meta-path finder: extends the search path of vLLM's packages as they load.

    It never finds a module itself. It asks the finders after it and adds our folder to
    what they found, so that no package of vLLM's has to be imported for our sake.
    """

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        folder = _counterpart(name)
        if folder is None:
            return None
        later = sys.meta_path[sys.meta_path.index(cls) + 1 :]
        for finder in later:
            spec = finder.find_spec(name, path, target)
            # No loader: a folder without __init__.py, such as our own, which hides an
            # editable vLLM because setuptools' finder comes after the path's. Go on.
            if spec is not None and spec.loader is not None:
                _append_once(spec.submodule_search_locations, folder)
                return spec
        return None


def _counterpart(name: str) -> str | None:
    """Our folder for the vLLM package ``name``; ``None`` if there is none."""
    top, *below = name.split(".")
    if top != "vllm":
        return None
    folder = os.path.join(_ROOT, *below)
    is_our_own_package = os.path.exists(os.path.join(folder, "__init__.py"))
    return folder if os.path.isdir(folder) and not is_our_own_package else None


def _append_once(paths: list[str] | None, folder: str) -> None:
    if paths is not None and folder not in paths:
        paths.append(folder)


def extend_vllm_path() -> None:
    """Let our modules import under their in-tree names; safe to call repeatedly.

    Does nothing where our files already are in vLLM's own package folder.
    """
    if os.path.exists(os.path.join(_ROOT, "__init__.py")):
        return
    if _PathExtender not in sys.meta_path:
        sys.meta_path.insert(0, _PathExtender)
    for name, module in list(sys.modules.items()):
        folder = _counterpart(name)
        if folder is not None:
            _append_once(getattr(module, "__path__", None), folder)


def register() -> None:
    """Entry point of the ``vllm.general_plugins`` group: install the hooks."""
    extend_vllm_path()
    from vllm.plugins.hybrid_w4a16 import register as install_hooks

    install_hooks()


def main() -> int:
    """The command ``vllm-hybrid-w4a16``; returns its exit status."""
    import importlib
    import types

    # vLLM logs to standard output, where the command's own output goes
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    extend_vllm_path()
    # Under a name of their own: as part of vllm.plugins they would import vLLM and
    # torch, seconds before --help or a bad path is answered.
    commands = types.ModuleType(f"{__name__}_commands")
    commands.__path__ = [os.path.join(_ROOT, "plugins", "hybrid_w4a16")]
    sys.modules[commands.__name__] = commands
    return importlib.import_module(f"{commands.__name__}.cli").main()
