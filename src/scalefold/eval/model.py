"""The model that evaluates: a second copy, in evaluation mode, captured in one graph per length."""

from dataclasses import dataclass

import torch
from torch import Tensor

from scalefold.config import Config
from scalefold.kernels.table import Operations, use_operations
from scalefold.model.alphafold import AlphaFold, cast_trunk
from scalefold.model.metrics import prediction_lddt_ca
from scalefold.step.parameters import FlatLayout, lay_out


@dataclass(frozen=True)
class CapturedChain:
    """Forward of one padded length: the graph, the buffers it reads and the score that it writes."""

    graph: "torch.cuda.CUDAGraph"
    inputs: dict[str, Tensor]
    score: Tensor


class EvaluationModel:
    """A second copy of the model, in evaluation mode and evaluation precision."""

    def __init__(self, config: Config, device: torch.device, ops: Operations) -> None:
        self.config, self.device, self.ops = config, device, ops
        self.model = AlphaFold(config.model).to(device).eval().requires_grad_(False)
        use_operations(self.model, ops)
        if config.execution.eval_precision == "bf16":
            cast_trunk(self.model, torch.bfloat16)
        lay_out(self.model)
        self._graphs: dict[int, CapturedChain] = {}
        self._stream = torch.cuda.Stream() if device.type == "cuda" else None

    @torch.no_grad()
    def load(self, flat: FlatLayout, weights: Tensor) -> None:
        """Take the weights of a flat fp32 buffer with the layout of ``flat``."""
        parameters = dict(self.model.named_parameters())
        sources = dict(flat.named_views(weights))
        torch._foreach_copy_([parameters[name] for name in sources], list(sources.values()))

    def use(self, ops: Operations) -> None:
        """Go on with another operations table, without the graphs of this one."""
        if ops is not self.ops:
            use_operations(self.model, ops)
            self.ops, self._graphs = ops, {}

    def close(self) -> None:
        """Destroy the graphs."""
        for captured in self._graphs.values():
            captured.graph.reset()
        self._graphs = {}

    @torch.no_grad()
    def capture(self, features: dict[str, Tensor]) -> None:
        """Predict chains of this padded length from a CUDA graph from now on; a length is eager before.

        Called with one chain of the length. It runs once uncaptured, on the stream of the capture: kernels compile,
        constants reach the device, and the libraries' workspaces of that stream lie outside the graphs' memory.
        Uncaptured, the host needs as long to launch a short chain as a long one.
        """
        assert self._stream is not None, "graphs need a CUDA device"
        pool = next((chain.graph.pool() for chain in self._graphs.values()), None)
        graph, inputs = torch.cuda.CUDAGraph(), {key: value.clone() for key, value in features.items()}
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._score(inputs)
        with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
            score = self._score(inputs)  # entering the context has waited for the device
        self._graphs[features["aatype"].shape[1]] = CapturedChain(graph, inputs, score)

    @torch.no_grad()
    def predict(self, features: dict[str, Tensor]) -> Tensor:
        """lDDT-Cα of one chain, a device scalar [1].

        Graphs share memory and are replayed one after another on the current stream; the score is copied out of it.
        """
        captured = self._graphs.get(features["aatype"].shape[1])
        if captured is None:
            return self._score(features)
        for key, buffer in captured.inputs.items():
            buffer.copy_(features[key], non_blocking=True)
        captured.graph.replay()
        return captured.score.clone()

    def _score(self, features: dict[str, Tensor]) -> Tensor:
        with precision(self.config.execution.eval_precision):
            outputs = self.model.predict(features)  # scores need no head
        return prediction_lddt_ca(outputs["final_atom_positions"], features)


class precision:
    """Context: matrix products of fp32 tensors in TF32 or full fp32."""

    def __init__(self, name: str) -> None:
        self._allow = name != "fp32"

    def __enter__(self) -> None:
        self._before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self._allow

    def __exit__(self, *_: object) -> None:
        torch.backends.cuda.matmul.allow_tf32 = self._before
