# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""Bootstrap of the overlay: makes our modules importable at their in-tree names.

Our files are in a folder ``vllm`` beside this file. If a regular vLLM shares our
site-packages, that folder is the installed ``vllm`` package itself. If vLLM or this
project is installed in editable mode, it is a separate folder. Then each vLLM package
with a counterpart in our folder gets that counterpart appended to its ``__path__``.
vLLM's own folder stays first, so that none of its modules can be shadowed.

``vllm_hybrid_w4a16.pth`` runs this file when Python starts, so it imports only ``os``
and ``sys``. The ``vllm.general_plugins`` entry point is ``register``; the command
``vllm-hybrid-w4a16`` is ``main``.
"""

import os
import sys

_ROOT = os.path.join(os.path.dirname(os.path.realpath(__file__)), "vllm")


class _PathExtender:
    """Meta-path finder that extends the search path of vLLM's packages as they load.

    It never finds a module itself. It asks the later finders and adds our folder to
    their result, so that it need not import any vLLM package.
    """

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        folder = _counterpart(name)
        if folder is None:
            return None
        later = sys.meta_path[sys.meta_path.index(cls) + 1 :]
        for finder in later:
            spec = finder.find_spec(name, path, target)
            # No loader: a folder without __init__.py, such as our own. It hides an
            # editable vLLM, because setuptools' finder comes after the path's. Go on.
            if spec is not None and spec.loader is not None:
                _append_once(spec.submodule_search_locations, folder)
                return spec
        return None


def _counterpart(name: str) -> str | None:
    """Return our folder for the vLLM package ``name``; ``None`` if there is none."""
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
    """Make our modules importable under their in-tree names; may be called repeatedly.

    Does nothing if our files are in vLLM's own package folder.
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

    # vLLM logs to standard output, which the command needs for its own output
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    extend_vllm_path()
    # Load them under a separate name: as part of vllm.plugins they would import vLLM
    # and torch first, which takes seconds even for --help or a bad path.
    commands = types.ModuleType(f"{__name__}_commands")
    commands.__path__ = [os.path.join(_ROOT, "plugins", "hybrid_w4a16")]
    sys.modules[commands.__name__] = commands
    return importlib.import_module(f"{commands.__name__}.cli").main()
