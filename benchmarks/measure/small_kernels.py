"""What lies around the trunk: structure module, heads, losses, embedders, templates, as many small kernels or as few.

    python benchmarks/measure/small_kernels.py --minutes 6                 # every part, then whole steps at R = 1
    python benchmarks/measure/small_kernels.py --small                     # tiny sizes on the CPU, to try the script

Variants: ``plain`` (the definitions in PyTorch), ``ours`` (the operations as a run takes them), ``unstitched`` (without
``STITCHED`` ones, for which the model has a definition), ``single`` (so, and iterations of the structure module one by
one), ``compiled`` (regions of ``step/fuse.py`` around the plain definitions), ``fused`` (those regions around our
operations, as ``execution.compile`` runs them), ``autotuned`` (``compiled`` with Inductor's max-autotune). Each part
runs forward and backward, dropout on. Before it is timed, its results are compared with the plain ones in fp32, and the
bits of REPEATS calls with each other, memory poisoned in between (``bits.py``). Time and kernels are those of a
replayed CUDA graph; ``small`` counts PyTorch's and Inductor's, without the library's products. A step's error is
that of its gradients against the first variant's; its bits are those of two replays. ``--list``: kernels by name.
"""

import argparse
import dataclasses
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config

from common import FOLDER, ROOT, append_rows, capture, facts, graph_microseconds, print_table, time_calls
from scalefold.config import Config, load_config
from scalefold.data.configured import feature_settings
from scalefold.data.loading.loader import Batch
from scalefold.data.made.synthetic import synthetic_batch
from scalefold.kernels.choice import operations
from scalefold.kernels.reference import elsewhere
from scalefold.kernels.table import REFERENCE, Operations, use_operations
from scalefold.model.alphafold import AlphaFold, Recycled, atom14_to_atom37, cast_trunk, select_slice
from scalefold.model.loss import loss_terms, total_of_terms
from scalefold.parallel.ranks import prepare_process
from scalefold.step.fuse import can_fuse, fuse_model, fuse_terms
from scalefold.step.graphs import TrainStep, preserved
from scalefold.tune.sound.bits import differences, repeat
from step_time import build, enliven, kernel_times

REPEATS, REPLAYS = 20, 30
SEED = 7
STITCHED = [field.name for field in dataclasses.fields(Operations) if field.default is elsewhere]
ONE_BLOCK = [f"model.{stack}.num_blocks=1" for stack in ("evoformer", "extra_msa", "template")]  # not run here
FAINT = 1e-3  # a gradient that should vanish is judged by the largest of its part
INDUCTORS, LIBRARY = ("triton_",), ("gemm", "cutlass", "nvjet", "xmma", "cublas")  # parts of kernel names
PYTORCHS = ("at::native", "Mem", "mem", "softmax", "elementwise", "reduction_prod")


@dataclass(frozen=True)
class Variant:
    """How the parts are computed."""

    ops: Operations
    compiled: bool = False
    inductor: dict[str, object] = field(default_factory=dict)  # options of Inductor beside those of ``step/fuse.py``


@dataclass(frozen=True)
class Part:
    """A call that gives outputs with a graph, and what its gradients are taken for."""

    call: Callable[[], Sequence[Tensor]]
    leaves: list[Tensor]


def variants(small: bool) -> dict[str, Variant]:
    """All of them; where there is no GPU, those that run on a CPU."""
    ours = REFERENCE if small else operations("triton")
    unstitched = dataclasses.replace(ours, **dict.fromkeys(STITCHED, elsewhere))
    single = dataclasses.replace(unstitched, structure_iterations=REFERENCE.structure_iterations)
    found = {"plain": Variant(REFERENCE), "single": Variant(single)}
    found |= {"unstitched": Variant(unstitched), "ours": Variant(ours)}
    found |= {"fused": Variant(ours, True), "compiled": Variant(REFERENCE, True)}
    tuned: dict[str, object] = {"max_autotune": True, "deterministic": False}
    return found | {"autotuned": Variant(REFERENCE, True, tuned)}


class Parts:
    """The model's parts around the trunk on a batch of the benchmark's sizes, with inputs as the trunk hands them."""

    def __init__(self, config: Config, device: torch.device, variant: Variant, dtype: torch.dtype) -> None:
        self.model = AlphaFold(config.model, seed=0).to(device).train()
        enliven(self.model)
        cast_trunk(self.model, dtype)
        use_operations(self.model, variant.ops)
        self.ops = REFERENCE if variant.compiled else variant.ops  # of the losses
        self.terms = loss_terms(config.loss, self.ops)
        if variant.compiled:
            fuse_model(self.model)
            self.terms = fuse_terms(self.terms)
        batch = synthetic_batch(feature_settings(config), 1, seed=1, device=str(device))
        self.features = select_slice(batch.features, 0)
        self.config, self.dtype, self.device = config, dtype, device
        self.generator = torch.Generator().manual_seed(2)

    def build(self, name: str) -> Part:
        """The part of that name."""
        return getattr(self, name)()

    def draw(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A leaf; values that bf16 holds exactly."""
        value = torch.randn(shape, generator=self.generator).bfloat16()
        return value.to(self.device, dtype or self.dtype).requires_grad_()

    @property
    def num_res(self) -> int:
        return self.features["aatype"].shape[1]

    def pair(self) -> Tensor:
        return self.draw(1, self.num_res, self.num_res, self.config.model.c_z)

    def single(self) -> Tensor:
        return self.draw(1, self.num_res, self.config.model.c_s)

    def parameters(self, *modules: nn.Module) -> list[Tensor]:
        return [parameter for module in modules for parameter in module.parameters()]

    def iterations(self) -> Part:
        """Structure module without what reads out its states."""
        module, s, z, mask = self.model.structure_module, self.single(), self.pair(), self.features["seq_mask"]
        read_out = {id(parameter) for parameter in module.angle_resnet.parameters()}

        def call() -> Sequence[Tensor]:
            _, z_, s_, shared = module.enter(s, z)
            return module.iterate(s_, z_, shared, mask, module._dropout_masks(s_))

        return Part(call, [s, z, *(p for p in module.parameters() if id(p) not in read_out)])

    def read_out(self) -> Part:
        """Angles, frames and atoms of all iterations."""
        module, count = self.model.structure_module, self.config.model.structure.num_blocks
        lead, fp32 = (1, count, self.num_res), torch.float32
        states, translations = (self.draw(*lead, c, dtype=fp32) for c in (self.config.model.c_s, 3))
        quaternions = nn.functional.normalize(self.draw(*lead, 4, dtype=fp32).detach(), dim=-1).requires_grad_()
        s_initial = self.draw(1, self.num_res, self.config.model.c_s, dtype=fp32)
        aatype = self.features["aatype"]

        def call() -> Sequence[Tensor]:
            return module.read_out(states, s_initial, quaternions, translations, aatype)

        return Part(call, [states, s_initial, quaternions, translations, *self.parameters(module.angle_resnet)])

    def heads(self) -> Part:
        """All auxiliary heads."""
        m = self.draw(1, self.features["msa_feat"].shape[1], self.num_res, self.config.model.c_m)
        single = self.draw(1, self.num_res, self.config.model.c_s, dtype=torch.float32)
        outputs = {"sm_single": single, "pair": self.pair(), "msa": m, "single": self.single()}
        head = self.model.auxiliary_heads

        def call() -> Sequence[Tensor]:
            return [logits for logits in head(outputs).values() if logits.requires_grad]

        return Part(call, [*outputs.values(), *self.parameters(head)])

    def losses(self) -> Part:
        """All loss terms and their sum, for what the model finds after random pair and single representations."""
        model, features = self.model, self.features
        with torch.no_grad():
            m = self.draw(1, features["msa_feat"].shape[1], self.num_res, self.config.model.c_m)
            single, pair = self.single(), self.pair()
            torch.manual_seed(SEED)
            structure = model.structure_module(single, pair, features["seq_mask"], features["aatype"])._asdict()
            found = structure | {"msa": m, "pair": pair, "single": single}
            found |= model.auxiliary_heads(found)
            found["final_atom_positions"] = atom14_to_atom37(found["sm_positions"][:, -1], features)
        rounded = {key: value.bfloat16().float() for key, value in found.items() if key.startswith(("sm_", "final"))}
        outputs = {key: value.detach().float() for key, value in (found | rounded).items()}
        leaves = [outputs[key].requires_grad_() for key in outputs if key.startswith("sm_") or key.endswith("logits")]

        def call() -> Sequence[Tensor]:
            return [total_of_terms(outputs, features, self.terms, self.ops)[0]]

        return Part(call, leaves)

    def embedders(self) -> Part:
        """Input, recycling and extra MSA embedders."""
        model, n, c = self.model, self.num_res, self.config.model
        x = 10.0 * self.draw(1, n, 37, 3, dtype=torch.float32).detach()
        recycled = Recycled(self.draw(1, n, c.c_m).detach(), self.pair().detach(), x)

        def call() -> Sequence[Tensor]:
            return [*model.embed_sample(self.features, recycled), model.embed_extra_msa(self.features)]

        modules = (model.input_embedder, model.recycling_embedder, model.extra_msa_embedder)
        return Part(call, self.parameters(*modules))

    def templates(self) -> Part:
        """Template features, their embedders, and the attention over templates."""
        model, z, count = self.model, self.pair(), self.features["template_mask"].shape[1]
        t = self.draw(1, count, self.num_res, self.num_res, self.config.model.c_t)

        def call() -> Sequence[Tensor]:
            update = model.add_templates(z, t, self.features["template_mask"])
            return [*model.embed_templates(self.features), update]

        modules = (model.template_pair_embedder, model.template_angle_embedder, model.template_pointwise_attention)
        return Part(call, [z, t, *self.parameters(*modules)])


PARTS = ("iterations", "read_out", "heads", "losses", "embedders", "templates")


def seeds_of(part: Part) -> list[Tensor]:
    """Gradients of a part's outputs, the same for all variants."""
    outputs = [output for output in part.call() if output.requires_grad]
    generator = torch.Generator(device=outputs[0].device).manual_seed(3)
    return [torch.randn(o.shape, generator=generator, device=o.device).to(o.dtype) for o in outputs]


def forward_backward(part: Part, seeds: Sequence[Tensor]) -> list[Tensor]:
    """Outputs and gradients; zeros where a leaf gets none."""
    outputs = [output for output in part.call() if output.requires_grad]
    gradients = torch.autograd.grad(outputs, part.leaves, seeds, allow_unused=True)
    found = [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, part.leaves, strict=True)]
    return [*(output.detach() for output in outputs), *found]


def results(part: Part, seeds: Sequence[Tensor]) -> list[Tensor]:
    """The same, from one state of the generator."""
    torch.manual_seed(SEED)
    return forward_backward(part, seeds)


def exact_results(config: Config, device: torch.device, names: Sequence[str]) -> dict[str, list[Tensor]]:
    """The plain definitions in fp32, on the CPU."""
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    parts, found = Parts(config, device, Variant(REFERENCE), torch.float32), {}
    for name in names:
        part = fresh(parts, name)
        found[name] = [x.float().cpu() for x in results(part, seeds_of(part))]
    torch.backends.cuda.matmul.allow_tf32 = before
    return found


def fresh(parts: Parts, name: str) -> Part:
    """A part whose inputs do not depend on which others were built before."""
    parts.generator.manual_seed(2)
    return parts.build(name)


def largest_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest relative error of an output or gradient, in norm."""
    faint = FAINT * max(float(b.norm()) for b in exact)
    return max(
        float((a.float().cpu() - b).norm()) / max(float(b.norm()), faint) for a, b in zip(found, exact, strict=True)
    )


def measure(part: Part, exact: Sequence[Tensor], repeats: int, listed: bool) -> dict[str, object]:
    """Error, bits, then time and kernels of a replayed graph; on a CPU errors and bits alone."""
    seeds = seeds_of(part)
    error = largest_error(results(part, seeds), exact)
    differing = len(repeat(lambda: results(part, seeds), repeats))
    judged: dict[str, object] = {"max_rel_error": f"{error:.2e}", "repeats": repeats, "differing": differing}
    if not torch.cuda.is_available():
        return row_of(None, {}) | judged
    graph = capture(lambda: forward_backward(part, seeds), 2)
    times = kernel_times(graph.replay, None)
    del graph
    for kernel, own in sorted(times.items(), key=lambda item: -sum(item[1])) if listed else ():
        print(f"    {kernel[:110]}: {len(own)} x {', '.join(f'{t:.1f}' for t in own[:8])} us", flush=True)
    return row_of(graph_microseconds(lambda: forward_backward(part, seeds), REPLAYS, 1), times) | judged


def row_of(microseconds: float | None, times: dict[str, list[float]]) -> dict[str, object]:
    """Columns of a replay: its time, its kernels, those of PyTorch and Inductor among them and their time."""
    small = [t for kernel, own in times.items() if is_small(kernel) for t in own]
    found: dict[str, object] = {
        "us": "" if microseconds is None else round(microseconds, 1),
        "kernels": sum(map(len, times.values())),
        "small": len(small),
        "small_us": round(sum(small), 1),
    }
    return found | dict.fromkeys(("max_rel_error", "repeats", "differing"), "")


def measure_parts(
    config: Config, device: torch.device, chosen: dict[str, Variant], arguments: argparse.Namespace
) -> list[dict[str, object]]:
    """One row per part and variant; a variant that cannot be measured is named and left out."""
    exact, rows, known = exact_results(config, device, arguments.parts), [], facts()
    for variant_name, variant in chosen.items():
        if time.monotonic() > arguments.deadline:
            print(f"{variant_name}: no time left", flush=True)
            continue
        torch._dynamo.reset()  # else another variant's code would serve this one's model
        parts = Parts(config, device, variant, torch.float32 if arguments.small else torch.bfloat16)
        for name in arguments.parts:
            start = time.monotonic()
            try:
                with inductor_config.patch(variant.inductor):
                    found = measure(fresh(parts, name), exact[name], arguments.repeats, arguments.list)
            except Exception as problem:
                print(f"  {name}: {variant_name}: {type(problem).__name__}: {str(problem)[:200]}", flush=True)
                continue
            row = {**known, "part": name, "variant": variant_name, **found}
            print(f"  {name} {variant_name} {found} ({time.monotonic() - start:.0f} s)", flush=True)
            append_rows(arguments.csv, [] if arguments.small else [row])
            rows.append(row)
        del parts
        gc.collect()
    return rows


def measure_steps(chosen: dict[str, Variant], arguments: argparse.Namespace) -> list[dict[str, object]]:
    """The whole step, for variants that a run can have: time, kernels, and which of them are small."""
    rows: list[dict[str, object]] = []
    first: dict[int, list[Tensor]] = {}
    for name in ("single", "unstitched", "ours", "fused"):
        for passes in arguments.passes:
            if name in chosen and time.monotonic() < arguments.deadline:
                rows.append(step_row(name, chosen[name], passes, first, arguments.list))
                append_rows(arguments.csv, rows[-1:])
                print(f"  {rows[-1]}", flush=True)
                gc.collect()
                torch.cuda.empty_cache()
    return rows


def step_row(
    name: str, variant: Variant, passes: int, first: dict[int, list[Tensor]], listed: bool
) -> dict[str, object]:
    """One row, for a step of its own. ``first``: gradients of the first variant, by passes, on the host."""
    start = time.monotonic()
    config = load_config(ROOT / "configs" / "base.yaml", [f"execution.compile={str(variant.compiled).lower()}"]).config
    batch = synthetic_batch(feature_settings(config), 1, seed=1, device="cuda")
    torch._dynamo.reset()
    _, step = build(config, variant.ops)
    with inductor_config.patch(variant.inductor):
        step.warm_up(batch, passes, lambda text: None)
    found, again = gradients(step, batch, passes), gradients(step, batch, passes)  # timed calls change the weights
    milliseconds = time_calls(lambda: step(batch, passes, 1), 15).median_ms
    times = kernel_times(lambda: step(batch, passes, 1), None)
    exact = first.setdefault(passes, found)
    error = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(found, exact, strict=True))
    judged = {"max_rel_error": f"{error:.2e}", "repeats": 1, "differing": len(differences(found, again))}
    step.close()
    for kernel, own in sorted(times.items(), key=lambda item: -len(item[1])) if listed else ():
        if is_small(kernel):
            print(f"    {name} {len(own):5d} x {sum(own) / len(own):7.1f} us  {kernel[:110]}", flush=True)
    print(f"  {name} R={passes}: {time.monotonic() - start:.0f} s", flush=True)
    return {**facts(), "part": f"step R={passes}", "variant": name, **row_of(1e3 * milliseconds, times), **judged}


def gradients(step: TrainStep, batch: Batch, passes: int) -> list[Tensor]:
    """Flat gradients of one step from one state of weights and generator, on the host."""
    with preserved(step.optimizer):
        torch.manual_seed(SEED)
        step(batch, passes, 1)
        return [gradient.cpu() for gradient in step.optimizer.flat.gradients.values()]


def is_small(kernel: str) -> bool:
    """Whether a kernel is PyTorch's own or Inductor's: neither a product of the library nor one of our programs."""
    if any(word in kernel for word in LIBRARY):
        return False
    return any(word in kernel for word in (*PYTORCHS, *INDUCTORS))


def main() -> int:
    """Measure what the command line asks for; exit status 1 if bits differ or nothing was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--variants", nargs="+", help="default: all but autotuned")
    parser.add_argument("--passes", type=int, nargs="*", default=[1], help="of whole steps; none: no step")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--minutes", type=float, default=6.0, help="no variant begins later than this")
    parser.add_argument("--list", action="store_true", help="print kernels of parts, and small ones of steps")
    parser.add_argument("--small", action="store_true", help="tiny model on the CPU; no CSV rows")
    parser.add_argument("--csv", type=Path, default=FOLDER / "small_kernels.csv")
    arguments = parser.parse_args()
    arguments.deadline = time.monotonic() + 60 * arguments.minutes
    file = ROOT / "configs" / ("tiny.yaml" if arguments.small else "base.yaml")
    config = load_config(file, [] if arguments.small else ONE_BLOCK).config
    prepare_process(config)
    device = torch.device("cpu" if arguments.small else "cuda")
    known = variants(arguments.small)
    names = arguments.variants or [name for name in known if name != "autotuned"]
    if any(known[name].compiled for name in names) and not can_fuse(device):
        names = [name for name in names if not known[name].compiled]
    chosen = {name: known[name] for name in names}
    with torch.cuda.stream(None if arguments.small else torch.cuda.Stream()):  # one for all parts, captures included
        rows = measure_parts(config, device, chosen, arguments)
    if not arguments.small:
        rows += measure_steps(chosen, arguments)
    print_table(rows)
    return int(not rows or any(row["differing"] not in (0, "") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
