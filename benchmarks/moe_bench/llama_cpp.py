# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""llama.cpp's experts on the CPU: the graph that it builds for a layer's routed
experts, run through the C API of the ggml libraries in the ``llama_cpp`` package.

Weights are Q4_0, in the buffer type that llama.cpp picks for them at load (repacked
where its CPU code has a layout of its own). A symmetric int4 layer with groups of 32,
64 or 128 fits Q4_0 without loss: its blocks of 32 repeat the group's scale.
"""

import ctypes
import importlib.util
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moe_bench.inputs import Batch, Case, Int4Layer
from moe_bench.vllm_experts import Unavailable

# enum ggml_type
_F32, _Q4_0, _I32 = 0, 2, 26
_BLOCK = 32  # weights of a Q4_0 block: an fp16 scale, then 16 bytes of nibbles
_BLOCK_BYTES = 18
# Room for the descriptions of a graph's tensors, without their data.
_CONTEXT_BYTES = 1 << 20


class _InitParams(ctypes.Structure):
    """``struct ggml_init_params``"""

    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_say_nothing = _LOG(lambda level, text, data: None)


class _Ggml:
    """The functions that are used here; every pointer is a ``c_void_p``."""

    def __init__(self, folder: Path) -> None:
        # each needs the ones before
        self._libraries = [
            ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
            for name in ("libggml-base.so", "libggml-cpu.so")
        ]
        p, i64, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
        self._declare(None, "ggml_log_set", _LOG, p)
        self._declare(p, "ggml_init", _InitParams)
        self._declare(None, "ggml_free", p)
        self._declare(p, "ggml_new_tensor_2d", p, ctypes.c_int, i64, i64)
        self._declare(p, "ggml_new_tensor_3d", p, ctypes.c_int, i64, i64, i64)
        self._declare(p, "ggml_mul_mat_id", p, p, p, p)
        self._declare(p, "ggml_swiglu_split", p, p, p)
        self._declare(p, "ggml_mul", p, p, p)
        self._declare(p, "ggml_add", p, p, p)
        self._declare(p, "ggml_view_2d", p, p, i64, i64, size, size)
        self._declare(p, "ggml_new_graph", p)
        self._declare(None, "ggml_build_forward_expand", p, p)
        self._declare(p, "ggml_get_data", p)
        self._declare(size, "ggml_nbytes", p)
        self._declare(p, "ggml_backend_cpu_buffer_type")
        self._declare(p, "ggml_backend_alloc_ctx_tensors_from_buft", p, p)
        self._declare(None, "ggml_backend_buffer_free", p)
        self._declare(None, "ggml_backend_tensor_set", p, p, size, size)
        self._declare(ctypes.c_int, "ggml_backend_graph_compute", p, p)
        self._declare(ctypes.c_bool, "ggml_backend_dev_supports_op", p, p)
        self._declare(p, "ggml_backend_reg_get_proc_address", p, ctypes.c_char_p)
        self._declare(p, "ggml_backend_reg_dev_get", p, size)
        self._declare(ctypes.c_char_p, "ggml_backend_buft_name", p)
        self._declare(p, "ggml_backend_cpu_reg")
        self._declare(p, "ggml_backend_cpu_init")
        self._declare(None, "ggml_backend_cpu_set_n_threads", p, ctypes.c_int)
        self.log_set(_say_nothing, None)  # it has a line for every tensor

    def _declare(self, result: Any, name: str, *arguments: Any) -> None:
        for library in self._libraries:
            function = getattr(library, name, None)
            if function is not None:
                function.restype, function.argtypes = result, arguments
                setattr(self, name.removeprefix("ggml_"), function)
                return
        raise Unavailable(f"the ggml of this llama_cpp has no function {name}")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"ggml function {name} was not declared")

    def context(self) -> int:
        return self.init(_InitParams(_CONTEXT_BYTES, None, True))

    def weight_buffer_types(self) -> list[int]:
        """What llama.cpp tries for weights on the CPU, in its order."""
        reg = self.backend_cpu_reg()
        address = self.backend_reg_get_proc_address(
            reg, b"ggml_backend_dev_get_extra_bufts"
        )
        found: list[int] = []
        if address:
            kind = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)
            listed = kind(address)(self.backend_reg_dev_get(reg, 0))
            while listed and (pointer := listed[len(found)]):
                found.append(pointer)
        return [*found, self.backend_cpu_buffer_type()]


def _load() -> _Ggml:
    spec = importlib.util.find_spec("llama_cpp")  # not imported: only its libraries
    if spec is None or spec.origin is None:
        raise Unavailable("needs the package of requirements/llama-cpp.txt")
    folder = Path(spec.origin).parent / "lib"
    if not (folder / "libggml-cpu.so").is_file():
        raise Unavailable(f"{folder} has no libggml-cpu.so")
    return _Ggml(folder)


def to_q4_0(words: torch.Tensor, scales: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Words int32 [N, K//8] and scales [N, K//G] of one expert to Q4_0.

    Returns [N, K//32 * 18]. Raises ``ValueError`` where a scale is not an fp16 number.
    """
    half = scales.to(torch.float16)
    if not torch.equal(half.to(scales.dtype), scales):
        raise ValueError("a scale cannot be stored in fp16")
    n, k = words.shape[0], 8 * words.shape[1]
    pairs = words.numpy().view(np.uint8).reshape(n, k // _BLOCK, 16)
    nibbles = np.stack((pairs & 15, pairs >> 4), axis=-1).reshape(n, -1, _BLOCK)
    blocks = np.empty((n, k // _BLOCK, _BLOCK_BYTES), np.uint8)
    repeats = k // _BLOCK // scales.shape[1]
    by_block = half.numpy().repeat(repeats, axis=1)
    blocks[..., :2] = by_block.view(np.uint8).reshape(n, -1, 2)
    blocks[..., 2:] = nibbles[..., :16] | nibbles[..., 16:] << 4
    return blocks.reshape(n, -1)


def _free_with(owner: object, ggml: _Ggml, context: int, buffer: int) -> None:
    """Free a context and its tensors' data once ``owner`` is gone."""
    weakref.finalize(owner, ggml.free, context)
    weakref.finalize(owner, ggml.backend_buffer_free, buffer)


class _Layer:
    """The weights of one copy of a layer: gate, up and down, [E, N, K] each."""

    def __init__(self, ggml: _Ggml, case: Case, data: dict[str, Any]) -> None:
        shape = case.shape
        for buffer_type in ggml.weight_buffer_types():
            context = ggml.context()
            self.tensors = {
                name: ggml.new_tensor_3d(context, _Q4_0, k, n, shape.num_experts)
                for name, n, k in (
                    ("gate", shape.intermediate, shape.hidden),
                    ("up", shape.intermediate, shape.hidden),
                    ("down", shape.hidden, shape.intermediate),
                )
            }
            buffer = ggml.backend_alloc_ctx_tensors_from_buft(context, buffer_type)
            if buffer and self._is_supported(ggml, case):
                _free_with(self, ggml, context, buffer)
                self.kind = ggml.backend_buft_name(buffer_type).decode()
                break
            if buffer:
                ggml.backend_buffer_free(buffer)
            ggml.free(context)
        else:
            raise Unavailable("no buffer type of this ggml takes the weights")
        for name, tensor in self.tensors.items():
            assert ggml.nbytes(tensor) == data[name].nbytes
            ggml.backend_tensor_set(
                tensor, data[name].ctypes.data, 0, data[name].nbytes
            )

    def _is_supported(self, ggml: _Ggml, case: Case) -> bool:
        context = ggml.context()
        device = ggml.backend_reg_dev_get(ggml.backend_cpu_reg(), 0)
        x = ggml.new_tensor_3d(context, _F32, case.shape.hidden, 1, 1)
        ids = ggml.new_tensor_2d(context, _I32, case.shape.top_k, 1)
        product = ggml.mul_mat_id(context, self.tensors["gate"], x, ids)
        supported = ggml.backend_dev_supports_op(device, product)
        ggml.free(context)
        return supported


class _Graph:
    """The experts of one layer copy for a number of tokens."""

    def __init__(self, ggml: _Ggml, case: Case, layer: _Layer, tokens: int) -> None:
        hidden, top_k = case.shape.hidden, case.shape.top_k
        context = ggml.context()
        self.x = ggml.new_tensor_3d(context, _F32, hidden, 1, tokens)
        self.ids = ggml.new_tensor_2d(context, _I32, top_k, tokens)
        self.weights = ggml.new_tensor_3d(context, _F32, 1, top_k, tokens)
        gate = ggml.mul_mat_id(context, layer.tensors["gate"], self.x, self.ids)
        up = ggml.mul_mat_id(context, layer.tensors["up"], self.x, self.ids)
        middle = ggml.swiglu_split(context, gate, up)
        down = ggml.mul_mat_id(context, layer.tensors["down"], middle, self.ids)
        down = ggml.mul(context, down, self.weights)
        stride, out = 4 * hidden, None
        for t in range(top_k):
            part = ggml.view_2d(
                context, down, hidden, tokens, stride * top_k, stride * t
            )
            out = part if out is None else ggml.add(context, out, part)
        self.graph = ggml.new_graph(context)
        ggml.build_forward_expand(self.graph, out)
        buffer_type = ggml.backend_cpu_buffer_type()
        buffer = ggml.backend_alloc_ctx_tensors_from_buft(context, buffer_type)
        if not buffer:
            raise MemoryError(f"llama.cpp: no memory for {tokens} tokens")
        _free_with(self, ggml, context, buffer)
        floats = ctypes.cast(ggml.get_data(out), ctypes.POINTER(ctypes.c_float))
        self.out = torch.from_numpy(np.ctypeslib.as_array(floats, (tokens, hidden)))


def build(
    case: Case, layer: Int4Layer, copies: int
) -> Callable[[int, Batch], torch.Tensor]:
    """A layer's experts in llama.cpp, with as many threads as torch has."""
    ggml = _load()
    backend = ggml.backend_cpu_init()
    ggml.backend_cpu_set_n_threads(backend, torch.get_num_threads())
    inter = case.shape.intermediate

    def stored(words: torch.Tensor, scales: torch.Tensor) -> npt.NDArray[np.uint8]:
        experts, n, k8 = words.shape
        data = np.empty((experts, n, 8 * k8 // _BLOCK * _BLOCK_BYTES), np.uint8)
        for expert in range(experts):
            data[expert] = to_q4_0(words[expert], scales[expert])
        return data

    data = {
        "gate": stored(layer.w13[:, :inter], layer.s13[:, :inter]),
        "up": stored(layer.w13[:, inter:], layer.s13[:, inter:]),
        "down": stored(layer.w2, layer.s2),
    }
    layers = [_Layer(ggml, case, data) for _ in range(copies)]
    del data
    print(f"  llama-cpp: weights in buffers of type {layers[0].kind}", flush=True)
    graphs: dict[tuple[int, int], _Graph] = {}
    inputs: dict[int, tuple[Batch, list[torch.Tensor]]] = {}

    def call(index: int, batch: Batch) -> torch.Tensor:
        tokens = batch.x.shape[0]
        if (index, tokens) not in graphs:
            graphs[index, tokens] = _Graph(ggml, case, layers[index], tokens)
        if id(batch) not in inputs:  # llama.cpp's activations are fp32 to begin with
            values = [batch.x.float(), batch.topk_ids, batch.topk_weights.contiguous()]
            inputs[id(batch)] = batch, values
        graph = graphs[index, tokens]
        tensors = graph.x, graph.ids, graph.weights
        for tensor, value in zip(tensors, inputs[id(batch)][1], strict=True):
            ggml.backend_tensor_set(tensor, value.data_ptr(), 0, value.nbytes)
        status = ggml.backend_graph_compute(backend, graph.graph)
        if status != 0:
            raise RuntimeError(f"llama.cpp: ggml_backend_graph_compute gave {status}")
        return graph.out

    return call
