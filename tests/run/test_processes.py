"""What wraps the model: compiled layers under FSDP and DDP."""

import dataclasses
import os
import shutil

import pytest
import torch
import torch.distributed as dist
from conftest import pretrain_settings, random_model, random_tokens, tiny_config
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.testing._internal.distributed.fake_pg import FakeStore

from l0 import L0, mask_sets
from run.processes import Processes, compiles, shard, start_processes, wrap
from run.settings import UserError

CPU = torch.device("cpu")
LAYERS = 10  # more than the graphs that torch makes of one function before it gives up


@pytest.fixture
def graphs(monkeypatch):
    """A list that gets the number of products of each graph as it is made, and one of each as it runs."""
    made, run = [], []

    def compiler(module: torch.fx.GraphModule, example: list):
        products = sum(getattr(node.target, "__name__", "").split(".")[0] in ("mm", "addmm", "bmm")
                       for node in module.graph.nodes)
        made.append(products)

        def call(arguments: list):
            run.append(products)
            return module.forward(*arguments)

        call._boxed_call = True
        return call

    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler, partition_fn=min_cut_rematerialization_partition)
    plain = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: plain(self, backend=backend, **options))
    torch._dynamo.reset()
    yield made, run
    torch._dynamo.reset()


@pytest.fixture
def group(request, tmp_path):
    if request.param == "fsdp":  # of 8 processes, of which there is one: messages bring nothing
        dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    else:
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    yield request.param
    dist.destroy_process_group()


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("group", ["fsdp", "ddp"], indirect=True)
def test_every_product_of_every_layer_is_in_one_shared_graph(graphs, group, masked, checkpointing, source):
    made, run = graphs
    shape, processes = tiny_config(n_layers=LAYERS), Processes(0, 8, CPU, torch.bfloat16)
    settings = pretrain_settings("data", "out", source, parallel=group, compile="on", checkpointing=checkpointing)
    model = random_model(shape)
    model.checkpointing = checkpointing
    wrapped = wrap(shard(model, settings, processes), settings, processes)
    masks = L0(mask_sets(shape, dataclasses.replace(shape, hidden_size=16, n_layers=6, n_heads=2, n_kv_heads=1,
                                                    intermediate_size=24)) if masked else {})
    tokens, losses = random_tokens(shape), []
    for _ in range(2):
        run.clear()
        with processes.autocast():
            loss = wrapped(tokens, tokens, masks.sample(0, 0, 0))
        loss.backward()
        losses.append(float(loss.detach()))
    forward, backward = 7, 14  # a product for each weight, two for its gradients
    if torch.__version__.startswith("2.7."):  # whose compiler takes grouped attention apart
        forward, backward = 9, 18
    assert made == [forward, backward]
    assert sum(run) == LAYERS * (backward + forward * (2 if checkpointing == "full" else 1))
    with torch.no_grad(), processes.autocast():
        run.clear()
        model(tokens, tokens, masks.deterministic(), reduction="none")
    assert sum(run) == LAYERS * forward
    if group == "ddp":  # what FSDP gathers is nothing here
        eager = random_model(shape)
        with processes.autocast():
            assert losses == pytest.approx([float(eager(tokens, tokens, masks.sample(0, 0, 0)).detach())] * 2, rel=1e-3)


@pytest.mark.parametrize("group", ["fsdp", "ddp"], indirect=True)
def test_the_residual_stream_is_as_wide_sharded_as_whole(group, source):
    processes, widths = Processes(0, 8, CPU, torch.bfloat16), []
    settings = pretrain_settings("data", "out", source, parallel=group)
    model = shard(random_model(tiny_config()), settings, processes)
    for layer in model.model["layers"]:
        layer.register_forward_hook(lambda module, args, output: widths.extend([args[0].dtype, output.dtype]))
    with processes.autocast():
        model(random_tokens(tiny_config()), random_tokens(tiny_config()))
    assert widths == [torch.bfloat16] * 8


@pytest.mark.parametrize(("capability", "found", "cc", "reason"), [
    ((7, 0), "gcc", None, ""), ((9, 0), "clang", None, ""), ((8, 0), None, "/opt/gcc-12/bin/gcc", ""),
    ((6, 1), "gcc", None, "compute capability 7.0"), ((9, 0), "cc", None, "takes gcc")])  # triton does not look for cc
def test_auto_compiles_where_a_gpu_and_a_compiler_allow_it(monkeypatch, source, capsys, capability, found, cc, reason):
    cuda = {"is_available": True, "device_count": 1, "set_device": None, "get_device_capability": capability}
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(shutil, "which", lambda name: name if name == found else None)
    monkeypatch.delenv("CC", raising=False)
    if cc:
        monkeypatch.setenv("CC", cc)
    settings = pretrain_settings("data", "out", source, device="cuda")
    processes = start_processes(settings)
    assert compiles(settings, processes.device) == (not reason)
    said = capsys.readouterr().out
    assert said == "" if not reason else (said.startswith("note: layers are not compiled: ") and reason in said)
    asked = dataclasses.replace(settings, compile="on")
    if reason:
        with pytest.raises(UserError, match=f"compile = on, but .*{reason}.*; take --compile=off"):
            start_processes(asked)
    else:
        start_processes(asked)
    for kind in ("cpu", "mps"):
        assert not compiles(settings, torch.device(kind)) and compiles(asked, torch.device(kind))
    assert not compiles(dataclasses.replace(settings, compile="off"), processes.device)


def test_auto_takes_bf16_where_products_are_bf16(monkeypatch, source):
    """And asks for an allocator that loses little, unless the user has asked for another."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for capability, dtype in (((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((10, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        for own in (None, "backend:cudaMallocAsync"):
            monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
            monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
            if own:
                monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", own)
            processes = start_processes(pretrain_settings("data", "out", source, device="cuda"))
            assert processes.dtype == dtype and processes.device == torch.device("cuda", 0)
            assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == (own or "expandable_segments:True")
