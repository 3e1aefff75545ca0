# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""One rank of the support matrix: runs cells one after another in this process.

    python -m tests.support.matrix_worker CELLS_JSON CHECKPOINTS_FOLDER ANSWERS_JSONL

Importing vLLM takes far longer than a cell, so one process runs many cells. With two
ranks, vLLM's ``external_launcher`` executor connects them through RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT.

MATRIX_ARGUMENTS: JSON of additional arguments of ``LLM``, for a vLLM that needs some.
"""

import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from .matrix_cells import DEPLOYMENTS, Cell
from .tiny_models import make_checkpoint, prompts

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 24, 8
os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    VLLM_HYBRID_W4A16_MOE="require",
    VLLM_HYBRID_W4A16_LINEAR="1",
)


def answers(llm: Any, with_prompt: bool, seed: int = 0) -> list[dict[str, Any]]:
    """Return greedy completions with log-probabilities of prompt and completion tokens.

    seed: determines the prompts and their length.
    """
    from vllm import SamplingParams

    parameters = SamplingParams(
        temperature=0,
        max_tokens=NEW_TOKENS,
        logprobs=0,
        prompt_logprobs=0 if with_prompt else None,
        detokenize=False,
        ignore_eos=True,
    )
    length = PROMPT_TOKENS - 5 * seed
    texts = [{"prompt_token_ids": ids} for ids in prompts(PROMPTS, length, seed)]
    result = []
    for output in llm.generate(texts, parameters, use_tqdm=False):
        completion = output.outputs[0]
        tokens = list(completion.token_ids)
        said = [
            entry[token].logprob
            for token, entry in zip(tokens, completion.logprobs, strict=True)
        ]
        seen = None
        if with_prompt:
            ids = output.prompt_token_ids
            seen = [
                output.prompt_logprobs[i][ids[i]].logprob for i in range(1, len(ids))
            ]
        result.append(
            {
                "prompt": list(output.prompt_token_ids),
                "tokens": tokens,
                "seen": seen,
                "said": said,
            }
        )
    return result


def garbage_then_checkpoint(llm: Any, checkpoint: Path) -> None:
    """Load wrong weights, check that the tokens change, then load the right ones."""
    from .tiny_models import make_checkpoint as make

    before = answers(llm, False)
    recipe = Cell.from_json(json.loads(os.environ["MATRIX_CELL"])).recipe
    wrong = make(recipe, checkpoint.parent / "reseeded", seed=1)
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(wrong)})
    llm.reset_prefix_cache()
    after = answers(llm, False)
    assert [a["tokens"] for a in before] != [a["tokens"] for a in after]
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(checkpoint)})
    llm.reset_prefix_cache()


def our_linears(model: torch.nn.Module) -> tuple[list[str], list[str], int]:
    """Names of linears on ``HybridW4A16LinearKernel``, and of those that were quantized
    at load; how many share a launch with another."""
    from vllm.model_executor.kernels.linear.mixed_precision.hybrid_w4a16 import (
        HybridW4A16LinearKernel,
    )
    from vllm.model_executor.kernels.linear.mixed_precision.hybrid_w4a16_pair import (
        pair_of,
    )
    from vllm.model_executor.layers.quantization.hybrid_w4a16_online_linear import (
        HybridW4A16OnlineLinearMethod,
    )

    found, quantized = [], []
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, HybridW4A16OnlineLinearMethod):
            quantized.append(name)
        # some methods hold another one, compressed-tensors' is the layer's scheme
        for holder in (method, getattr(module, "scheme", None)):
            while holder is not None:
                if isinstance(getattr(holder, "kernel", None), HybridW4A16LinearKernel):
                    found.append(name)
                inner = getattr(holder, "scheme", None)
                holder = inner or getattr(holder, "linear_method", None)
    paired = sum(pair_of(module) is not None for module in model.modules())
    return found, quantized, paired


def sleep_and_wake(llm: Any) -> None:
    """Use both levels of vLLM's sleep mode: memory is released and no token changes."""
    tokens = [a["tokens"] for a in answers(llm, False)]
    fall_asleep(llm, level=1)
    llm.wake_up()
    assert [a["tokens"] for a in answers(llm, False)] == tokens
    fall_asleep(llm, level=2)
    llm.wake_up(tags=["weights"])
    llm.apply_model(forget_weights)
    llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])
    assert [a["tokens"] for a in answers(llm, False)] == tokens


def fall_asleep(llm: Any, level: int) -> None:
    """Sleep, and check that the device gets back at least the weights' memory."""
    from vllm.device_allocator import get_mem_allocator_instance

    allocations = get_mem_allocator_instance().pointer_to_data
    sizes = {address: data.handle[1] for address, data in allocations.items()}
    weights = {a: sizes[a] for a, data in allocations.items() if data.tag == "weights"}

    def elsewhere(model: torch.nn.Module) -> list[str]:
        return [
            name
            for name, p in model.named_parameters()
            if p.numel()
            and not any(a <= p.data_ptr() < a + size for a, size in weights.items())
        ]

    assert llm.apply_model(elsewhere) == [[]]
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    llm.sleep(level=level)
    freed = torch.cuda.mem_get_info()[0] - free
    assert all(data.is_asleep for data in allocations.values())
    held = sum(sizes.values())
    print(
        f"level {level}: {freed=} {held=} weights={sum(weights.values())}", flush=True
    )
    assert freed >= held > sum(weights.values()) > 0


@torch.inference_mode()
def forget_weights(model: torch.nn.Module) -> None:
    """Overwrite everything that level 2 does not keep with NaN.

    Otherwise the memory might still contain the old weights.
    """
    from vllm.device_allocator import cumem

    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    pool = cumem.CuMemAllocator.get_instance()
    for address, data in pool.pointer_to_data.items():
        if data.tag == "weights":
            cumem.libcudart.cudaMemset(address, 0xFF, data.handle[1])
    torch.cuda.synchronize()
    assert all(p.isnan().all() for p in model.parameters() if p.is_floating_point())
    for name, buffer in model.named_buffers():
        buffer.copy_(kept[name])


def give_the_cpu_what_data_parallel_needs() -> None:
    """Add ``all_gatherv`` and ``reduce_scatterv`` to vLLM's CPU communicator.

    Without them no MoE model runs data-parallel on the CPU. With them the experts see
    the tokens of all ranks, as on a GPU.
    """
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    def gather_one(self, rows, sizes):
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(parts, padded, group=self.device_group)
        return torch.cat([p[:size] for p, size in zip(parts, sizes, strict=True)])

    def all_gatherv(self, input_, dim=0, sizes=None):
        assert dim == 0 and sizes is not None
        if isinstance(input_, torch.Tensor):
            return gather_one(self, input_, sizes)
        return [gather_one(self, each, sizes) for each in input_]

    def reduce_scatterv(self, input_, dim=0, sizes=None):
        assert dim == 0 and sizes is not None
        of_ranks = gather_one(self, input_[None], [1] * len(sizes))
        total = of_ranks.float().sum(0).to(input_.dtype)
        return total.split(sizes)[self.rank_in_group].clone()

    CpuCommunicator.all_gatherv = all_gatherv
    CpuCommunicator.reduce_scatterv = reduce_scatterv


def tell_shared_memory_of_cells_apart() -> None:
    """Put the port into the name of the CPU ranks' shared memory.

    vLLM derives the name from the rendezvous address, which is empty with an external
    launcher. Without the port, leftovers of a killed run would break the next run.
    """
    from vllm.distributed.device_communicators import cpu_communicator

    shared = cpu_communicator._CPUSHMDistributed
    name = shared.make_group_name
    shared.make_group_name = staticmethod(
        lambda ranks: os.environ["MASTER_PORT"] + name(ranks).lstrip("/")
    )


def run(cell: Cell, checkpoints: Path) -> list[dict[str, Any]]:
    """Run one cell and return its output."""
    from vllm import LLM
    from vllm.plugins import load_general_plugins

    deployment = DEPLOYMENTS[cell.deployment]
    checkpoint = make_checkpoint(cell.recipe, checkpoints)
    arguments: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "max_model_len": 128,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 128,
        "kv_cache_memory_bytes": 1 << 26,
        **({} if torch.cuda.is_available() else {"num_gpu_blocks_override": 64}),
        "dtype": cell.dtype,
        **deployment.arguments,
        **json.loads(os.environ.get("MATRIX_ARGUMENTS", "{}")),
    }
    if torch.cuda.is_available():  # other engines may be using the GPU
        arguments["gpu_memory_utilization"] = 0.1
    if cell.recipe.model == "qwen3_5_moe":  # there is no tokenizer to place images
        arguments["language_model_only"] = True
    seed = 0
    if deployment.data_parallel:
        if not torch.cuda.is_available():
            give_the_cpu_what_data_parallel_needs()
        seed = int(os.environ["RANK"])
    if deployment.ranks > 1:
        arguments["distributed_executor_backend"] = "external_launcher"
    at_load = "quantization_config" in arguments
    if at_load:  # whose names are checked before plugins are loaded
        load_general_plugins()
    llm = LLM(str(checkpoint), **arguments)
    ((linears, quantized, paired),) = llm.apply_model(our_linears)
    assert bool(linears) == cell.recipe.int4_attention, linears
    has_gdn = cell.recipe.model == "qwen3_5_moe"
    assert bool(paired) == (has_gdn and cell.recipe.int4_attention), paired
    assert bool(quantized) == at_load, quantized
    if deployment.reload:
        os.environ["MATRIX_CELL"] = json.dumps(cell.to_json())
        garbage_then_checkpoint(llm, checkpoint)
    if deployment.sleep:
        sleep_and_wake(llm)
    if arguments["enable_prefix_caching"]:
        answers(llm, False)  # fills the cache
    return answers(llm, deployment.seen, seed)


def main() -> None:
    cells_file, checkpoints, answers_file = map(Path, sys.argv[1:])
    port = int(os.environ.get("MASTER_PORT", "0"))
    from vllm.distributed import cleanup_dist_env_and_memory

    if not torch.cuda.is_available():
        tell_shared_memory_of_cells_apart()
    for index, values in enumerate(json.loads(cells_file.read_text())):
        cell = Cell.from_json(values)
        # vLLM collects garbage seven times per cell. Without the freeze each collection
        # visits every imported object, which takes longer than the cell itself.
        gc.freeze()
        os.environ["MASTER_PORT"] = str(port + index)
        start = time.monotonic()
        answer: dict[str, Any] = {"cell": values}
        try:
            answer["answers"] = run(cell, checkpoints)
        except Exception:
            answer["error"] = traceback.format_exc()
        answer["seconds"] = round(time.monotonic() - start, 1)
        gc.collect()
        cleanup_dist_env_and_memory()
        with answers_file.open("a") as file:
            file.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
