"""Explanations made by hand, of the shape that `Explanation.to_json()` promises: a small step, a sampler, 20,000 nodes.

Nothing here is measured; the numbers only have to be of a likely size and agree with each other.
"""

from __future__ import annotations

import random
from typing import Any

from fusion_compile.explain._facts import SCHEMA, VERSION
from fusion_compile.explain._findings import identity
from fusion_compile.passes import Finding

Data = dict[str, Any]

PEAK_FLOPS, BANDWIDTH = 989e12, 4.8e12  # per second
_BLOCK = [  # (name, operator, module, line, rows of the result, columns, inner dimension of a product)
    ("norm", "aten.native_layer_norm.default", "norm1", 41, 8192, 1152, 0),
    ("qkv", "aten.addmm.default", "attn.qkv", 57, 8192, 3456, 1152),
    ("scores", "aten._scaled_dot_product_flash_attention.default", "attn", 63, 8192, 1152, 512),
    ("proj", "aten.addmm.default", "attn.proj", 66, 8192, 1152, 1152),
    ("add", "aten.add.Tensor", "", 88, 8192, 1152, 0),
    ("fc1", "aten.addmm.default", "mlp.fc1", 91, 8192, 4608, 1152),
    ("gelu", "aten.gelu.default", "mlp.act", 92, 8192, 4608, 0),
    ("fc2", "aten.addmm.default", "mlp.fc2", 93, 8192, 1152, 4608),
]


def node(name: str, op: str, region: str, module: str, where: str, shape: list[int | str], **other: Any) -> Data:
    """A node of a graph with its roofline time; `flops`, `inputs`, `finding`, `binding_time` and `dtype` by keyword."""
    elements = 1
    for size in shape:
        elements *= size if isinstance(size, int) else 1
    flops = other.get("flops", 0)
    read = other.get("read", 2 * elements * 2)
    written = 2 * elements
    moved = read + written
    return {
        "name": name, "op": op, "region": region, "module": module, "where": where,
        "dtype": other.get("dtype", "bfloat16"), "shape": shape, "flops": flops, "bytes_read": read,
        "bytes_written": written, "intensity": flops / moved, "launches": 1,
        "microseconds": max(flops / PEAK_FLOPS, moved / BANDWIDTH) * 1e6, "inputs": other.get("inputs", []),
        "binding_time": other.get("binding_time"), "finding": other.get("finding"),
    }  # fmt: skip


def step_nodes(blocks: int) -> list[Data]:
    """Forward, backward and update of `blocks` transformer blocks, 24 nodes and a few more for each."""
    nodes: list[Data] = [
        node("tokens", "placeholder", "forward", "", "/home/ada/dit/train.py:20", [32, 256, 1152], read=0)
    ]

    def add(*args: Any, **other: Any) -> None:
        inputs = [len(nodes) - 1, *({max(0, len(nodes) - 9)} if len(nodes) % 5 == 0 else ())]
        nodes.append(node(*args, inputs=inputs, **other))

    for block in range(blocks):
        for name, op, module, line, rows, columns, inner in _BLOCK:
            path = f"blocks.{block}.{module}".rstrip(".")
            flops = 2 * rows * columns * inner if inner else (8 * rows * columns if "norm" in op or "gelu" in op else 0)
            add(
                f"{name}_{block}" if block else name, op, "forward", path, f"/home/ada/dit/model.py:{line}",
                [32, 256, columns], flops=flops,
            )  # fmt: skip
    add("loss", "aten.mse_loss.default", "forward", "", "/home/ada/dit/train.py:31", [], dtype="float32",
        flops=28_311_552, read=37_748_736)  # fmt: skip
    for block in reversed(range(blocks)):
        for name, op, module, line, rows, columns, inner in reversed(_BLOCK):
            path = f"blocks.{block}.{module}".rstrip(".")
            for part in ("grad_input", "grad_weight")[: 2 if inner and "attention" not in op else 1]:
                add(
                    f"{name}_{block}_{part}", op.replace("addmm", "mm"), "backward", path,
                    f"/home/ada/dit/model.py:{line}",
                    [32, 256, columns] if part == "grad_input" else [columns, inner], flops=2 * rows * columns * inner,
                )  # fmt: skip
    for block in range(blocks):
        for name, _, module, _, _, columns, inner in _BLOCK:
            if inner:
                add(
                    f"update_{name}_{block}", "aten._foreach_addcmul_.Scalar", "optimizer", f"blocks.{block}.{module}",
                    "/home/ada/dit/train.py:12", [columns, inner], dtype="float32", flops=6 * columns * inner,
                )  # fmt: skip
    return nodes


def graph(name: str, nodes: list[Data], edges: list[list[Any]]) -> Data:
    regions: dict[str, Data] = {}
    for each in nodes:
        region = regions.setdefault(
            each["region"],
            {"name": each["region"], "nodes": 0, "launches": 0, "flops": 0, "bytes": 0, "microseconds": 0.0},
        )
        region["nodes"] += 1
        region["launches"] += each["launches"]
        region["flops"] += each["flops"]
        region["bytes"] += each["bytes_read"] + each["bytes_written"]
        region["microseconds"] += each["microseconds"]
    curve, alive = [], 400_000_000
    saved = 0
    for each in nodes:
        if each["region"] == "backward":
            alive -= int(saved * 1.15 / max(1, regions["backward"]["nodes"]))
        else:
            kept = each["bytes_written"] if each["region"] in ("forward", "body") else 0
            saved, alive = saved + kept, alive + kept
        curve.append(max(0, alive + each["bytes_written"]))
    peak = curve.index(max(curve))
    largest = sorted((each for each in nodes[: peak + 1]), key=lambda each: -each["bytes_written"])[:40]
    memory = {
        "curve": curve, "peak_bytes": curve[peak], "peak_node": peak,
        "alive_at_peak": [{"name": n["name"], "bytes": n["bytes_written"], "where": n["where"]} for n in largest],
        "fused_peak_bytes": curve[peak] // 2,
    }  # fmt: skip
    return {"name": name, "regions": list(regions.values()), "edges": edges, "nodes": nodes, "memory": memory}


def finding(kind: str, op: str, where: str, why: str, remedy: str, severity: str = "error") -> Data:
    known: dict[str, Any] = {"kind": kind, "op": op, "where": where, "why": why, "remedy": remedy, "severity": severity}
    return {"id": identity(Finding(**known)), **known}


_FINDINGS = [
    finding(
        "python_scalar", "lr", "/home/ada/dit/train.py:12",
        "The learning rate is a Python float, so its value is compiled in: the next value compiles the step again.",
        "Give it as a 0-dimensional tensor, torch.tensor(1e-4), or as a schedule.", "warning",
    ),
    finding(
        "host_sync", "aten._local_scalar_dense.default", "/home/ada/dit/train.py:31",
        "`.item()` waits until the GPU has computed the loss; the step cannot be one replay.",
        "Return the loss as a tensor and read it every few steps, or give it to a ScalarLogger.",
    ),
    finding(
        "capture_unsafe", "aten._linalg_eigh.default", "/home/ada/dit/model.py:66",
        "eigh asks the host for its workspace; a CUDA graph cannot record that (cudaErrorStreamCaptureUnsupported).",
        "Run it every K steps by a periodic call, outside of the captured step.",
    ),
    finding(
        "checkpoint_ignored", "torch.utils.checkpoint", "/home/ada/dit/model.py:88",
        "The tags of the checkpointed block did not reach the backward, so its activations are kept.",
        "Use use_reentrant=False, and keep dropout out of the checkpointed part.", "warning",
    ),
    finding(
        "graph_break", "print", "/home/ada/dit/train.py:33",
        "`print` of a tensor needs its value on the host, so the program is cut in two.", "Print after the step.",
    ),
    finding(
        "rng_in_checkpoint", "aten.native_dropout.default", "",
        "Dropout in a checkpointed block would draw other numbers when it is computed again.",
        "Move it out of the block.", "note",
    ),
]  # fmt: skip


def _passes(nodes: list[Data]) -> list[Data]:
    text = [
        f"%{n['name']} = {n['op']}({', '.join('%' + nodes[i]['name'] for i in n['inputs'])})  # {n['where']}"
        for n in nodes
    ]
    deduplicated = [line for i, line in enumerate(text) if i % 17 != 3]
    folded = [line.replace("aten.add.Tensor", "aten.add_.Tensor") for line in deduplicated]
    return [
        {
            "name": "dedupe_weights", "exact": True, "changed": 3, "nodes_before": len(text),
            "nodes_after": len(deduplicated), "bytes_added": 0, "declined": [], "before": text, "after": deduplicated,
        },
        {
            "name": "fold_scale_into_linear", "exact": False, "changed": 2, "nodes_before": len(deduplicated),
            "nodes_after": len(folded), "bytes_added": 4096,
            "declined": [{"node": "qkv_1", "reason": "its result is also read by `scores_1`"}],
            "before": deduplicated, "after": folded,
        },
        {
            "name": "merge_casts", "exact": True, "changed": 0, "nodes_before": len(folded),
            "nodes_after": len(folded), "bytes_added": 0, "declined": [], "before": folded, "after": folded,
        },
    ]  # fmt: skip


def _runtime(nodes: list[Data]) -> Data:
    return {
        "graph_breaks": [
            {
                "reason": "`print` of a tensor: the value is needed on the host before the program goes on.",
                "where": "/home/ada/dit/train.py:33",
                "stack": ["/home/ada/dit/main.py:80: step(x)", "/home/ada/dit/train.py:33: print(loss)"],
            }
        ],
        "recompiles": [
            {
                "function": "step", "guard": "L['lr'] == 0.0001", "where": "/home/ada/dit/train.py:12",
                "compile_id": "0/1",
            }
        ],
        "guards": [
            {"text": "tensor L['x']: dtype bfloat16, shape [32, 256, 1152]", "where": "/home/ada/dit/train.py:20"},
            {"text": "L['lr'] == 0.0001", "where": "/home/ada/dit/train.py:12"},
        ],
        "kernels": [
            {
                "name": f"triton_per_fused_{n['name']}", "nodes": [n["name"]], "where": [n["where"]],
                "source": f"@triton.jit\ndef triton_per_fused_{n['name']}(in_ptr0, out_ptr0, xnumel):\n    pass\n",
            }
            for n in nodes if n["flops"] == 0 or "norm" in n["op"] or "gelu" in n["op"]
        ],
        "fusion_refusals": [
            {"first": a["name"], "second": b["name"], "reason": "no shared data"}
            for a, b in zip(nodes[::7], nodes[1::7], strict=False)
        ],
        "cudagraphs": {
            "captures": 2, "partitions": 1,
            "skips": [{"reason": "mutated inputs (1 instance)", "where": "/home/ada/dit/train.py:40"}],
            "rerecords": [{"reason": "static input 3 moved: blocks.0.attn.qkv.weight was rebound"}],
        },
        "phases": [
            {"name": "dynamo", "seconds": 3.81}, {"name": "aot autograd", "seconds": 6.4},
            {"name": "inductor", "seconds": 21.7}, {"name": "triton", "seconds": 14.2},
        ],
        "cache": {"hits": 12, "misses": 3, "bypasses": 1},
    }  # fmt: skip


def training_step(blocks: int = 2) -> Data:
    """A step with five findings, of which two are shown at nodes, three passes and runtime facts."""
    nodes = step_nodes(blocks)
    nodes[8 * blocks + 1]["finding"] = _FINDINGS[1]["id"]  # the loss
    nodes[4]["finding"] = _FINDINGS[2]["id"]
    step = graph(
        "step", nodes,
        [["forward", "backward", 1_630_000_000], ["backward", "optimizer", 92_000_000], ["forward", "optimizer", 8]],
    )  # fmt: skip
    return {
        "schema": SCHEMA, "version": VERSION, "title": "DiT-XL/2 training step",
        "kind": "training_step",
        "environment": {
            "torch": "2.13.0+cu130", "python": "3.12.3", "device": "NVIDIA H200",
            "roofline": "989 TFLOP/s bf16, 4.8 TB/s", "date": "2026-11-24",
        },
        "summary": [
            {"label": "graphs", "value": "1", "status": "good"},
            {"label": "graph breaks", "value": "1", "status": "bad"},
            {"label": "host syncs", "value": "1", "status": "bad"},
            {"label": "CUDA graph", "value": "captured, 1 partition", "status": "good"},
            {"label": "parameters", "value": "675 M", "status": "plain"},
            {"label": "peak memory", "value": "1.9 GiB", "status": "plain"},
        ],
        "findings": [dict(each) for each in _FINDINGS],
        "sections": [
            {
                "heading": "Optimizer routes", "columns": ["parameters", "rule", "count", "bytes"],
                "rows": [["matrices", "muon", "16", "42.1 MiB"], ["the rest", "adamw", "34", "0.4 MiB"]],
            }
        ],
        "graphs": [step], "passes": _passes(nodes), "runtime": _runtime(nodes), "hoisting": None,
        "notes": ["Times are lower bounds on the named device, not measurements."],
    }  # fmt: skip


def sampler() -> Data:
    """A sampler: two regions that are hoisted, one that stays in the loop, and nothing observed at runtime."""
    nodes: list[Data] = []
    values = []
    for region, binding, count in (("table", "schedule", 12), ("prologue", "request", 8), ("body", "step", 40)):
        for i in range(count):
            where = f"/home/ada/sd3/transformer.py:{100 + i}"
            inputs = [len(nodes) - 1] if nodes else []
            nodes.append(
                node(
                    f"{region}_{i}", ("aten.addmm.default", "aten.silu.default")[i % 2], region,
                    f"blocks.{i % 4}.norm1", where, [28 if region == "table" else 4096, 1536],
                    flops=(2 * 4096 * 1536 * 1536) * (i % 2 == 0), inputs=inputs, binding_time=binding,
                )
            )  # fmt: skip
            values.append(
                {
                    "name": f"{region}_{i}", "kind": "node", "binding_time": binding,
                    "chain": ["timestep (schedule)", "time_text_embed", f"{region}_{i}"],
                    "decision": "live" if region == "body" else "hoisted",
                    "reason": "reads the latents of each step" if region == "body" else "known once the schedule is",
                    "bytes": 86_016, "flops": 264_241_152, "frees_bytes": 0,
                }
            )  # fmt: skip
    values.append(
        {
            "name": "blocks.3.norm1.linear.weight", "kind": "parameter", "binding_time": "schedule",
            "chain": ["timestep (schedule)", "time_text_embed", "blocks.3.norm1.linear.weight"],
            "decision": "weight_freed", "reason": "read only by hoisted calls", "bytes": 0, "flops": 0,
            "frees_bytes": 28_311_552,
        }
    )  # fmt: skip
    edges = [["table", "body", 2_400_000], ["prologue", "body", 12_500_000]]
    return training_step() | {
        "title": "SD3 sampler, 28 steps", "kind": "sampler", "findings": [], "passes": [], "runtime": None, "notes": [],
        "graphs": [graph("sampler", nodes, edges)], "hoisting": {"values": values}, "sections": [],
        "summary": [{"label": "hoisted", "value": "20 of 60 calls", "status": "good"}],
    }  # fmt: skip


def large(count: int = 20_000) -> Data:
    """`count` nodes, 200 findings of which each has its node, 2,000 kernels and refusals, and passes over all nodes."""
    data = training_step(blocks=-(-count // 25))
    chance = random.Random(0)
    nodes = data["graphs"][0]["nodes"][:count]
    for each in nodes:
        each["finding"] = None
    places = sorted(chance.sample(range(count), 200))
    findings = []
    for i, place in enumerate(places):
        like = _FINDINGS[i % len(_FINDINGS)]
        nodes[place]["finding"] = f"finding {i}"
        own = {"id": f"finding {i}", "op": nodes[place]["op"], "where": nodes[place]["where"]}
        findings.append(like | own)
    data["findings"] = findings
    data["graphs"] = [graph("step", nodes, data["graphs"][0]["edges"])]
    data["passes"] = _passes(nodes)
    return data
