"""How modules run: compiled networks, exact float32, CUDA graphs."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoencoder.model import AttentionBlock
from ldm.denoiser import Denoiser, Estimate
from ldm.samplers import StepInfo
from ldm.transformer import Attention, attend, joined
from pipelines import TextToImagePipeline, runtime
from pipelines.runtime import CudaGraph


def test_a_compiled_pipeline_renders_the_same(
    model_folder: Path, pipe: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the backend that runs what was traced as it stands: whether all of it can be traced is what is at stake."""
    compile_module, compiled = nn.Module.compile, []

    def trace(module: nn.Module, **options: Any) -> None:
        assert options == {"dynamic": False, "mode": "default"}
        compiled.append(module)
        compile_module(module, backend="eager", fullgraph=True, dynamic=False)

    monkeypatch.setattr(nn.Module, "compile", trace)
    ours = TextToImagePipeline.from_pretrained(model_folder, device="cpu", dtype="float32", compile=True)
    assert compiled == [ours.unet, ours.autoencoder.decoder]
    assert list(ours.unet.state_dict()) == list(pipe.unet.state_dict())
    options: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt"}
    assert torch.equal(ours("a red house", **options).images, pipe("a red house", **options).images)


def test_self_attention_reads_its_input_in_one_product(pipe: TextToImagePipeline) -> None:
    for name, module in pipe.unet.named_modules():
        if isinstance(module, Attention):
            together = joined((module.to_q.weight, module.to_k.weight, module.to_v.weight))
            assert (together is not None) == name.endswith("attn1")


def test_float32_is_not_rounded_to_tf32_while_rendering(pipe: TextToImagePipeline) -> None:
    convolution = torch.backends.cudnn.conv
    before = convolution.fp32_precision
    assert before != "ieee"
    seen: list[str] = []

    def stop(info: StepInfo) -> None:
        seen.append(convolution.fp32_precision)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe("a red house", num_inference_steps=2, on_step=stop)
    assert (seen, convolution.fp32_precision) == (["ieee"], before)


def denoiser(seen: list[str]) -> Denoiser:
    def denoise(x_t: Tensor, t: Tensor) -> Estimate:
        seen.append(x_t.device.type)
        return Estimate(x_t * t.to(x_t).reshape(-1, 1), x_t + 1)

    return denoise


def check_a_graph_is_its_denoiser(device: str) -> None:
    seen: list[str] = []
    graph = CudaGraph(denoiser(seen))
    generator = torch.Generator().manual_seed(0)
    results = []
    for step in range(4):
        x_t, t = torch.randn(2, 3, generator=generator).to(device), torch.tensor([step, 2.0 * step], device=device)
        results.append((graph(x_t, t), denoiser([])(x_t, t)))
    for result, expected in results:  # none has been overwritten by the next
        assert torch.equal(result.x0, expected.x0)
        assert result.v is not None
        assert expected.v is not None
        assert torch.equal(result.v, expected.v)
    assert len(seen) == 2


def test_a_graph_is_replayed_on_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, where a graph is the list of the operations that were run while it was recorded."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Record(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.operations: list[tuple[Any, Any, Any, Tensor]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            self.operations.append((func, args, kwargs or {}, out))
            return out

        def replay(self) -> None:
            for func, args, kwargs, out in self.operations:
                out.copy_(func(*args, **kwargs))

    @contextmanager
    def recording(graph: Record, stream: torch.device) -> Iterator[None]:
        assert stream == torch.device("cpu")  # that of the device of what is recorded
        with graph:
            yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Record)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    check_a_graph_is_its_denoiser("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_is_its_denoiser() -> None:
    check_a_graph_is_its_denoiser("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"guidance_scale": 1}, {"sampler": "dpm++"}, {"sampler": "ddpm"}], ids=str)
def test_a_gpu_renders_what_the_cpu_does(
    options: dict[str, Any], model_folder: Path, pipe: TextToImagePipeline
) -> None:
    ours = TextToImagePipeline.from_pretrained(model_folder, device="cuda", dtype="float32")
    ask: dict[str, Any] = {"num_inference_steps": 5, "output_type": "latent", **options}
    latents, expected = (each("a red house", **ask).images for each in (ours, pipe))
    assert isinstance(latents, Tensor)
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(latents.cpu(), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_autoencoder_attends_as_the_unet_does(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    plain = AttentionBlock(32, 4)
    ready, seen = copy.deepcopy(plain), []

    def look(*given: torch.Tensor) -> torch.Tensor:
        seen.append([tuple(each.shape) for each in given])
        return attend(*given)

    monkeypatch.setattr(runtime, "attend", look)
    runtime.prepare(ready, torch.device("cpu"), torch.float32)
    x = torch.randn(2, 32, 5, 3)
    torch.testing.assert_close(ready(x), plain(x))
    assert seen == [[(2, 1, 15, 32)] * 3]
