"""LoRA-SB against the numbers of its authors' code."""

import math

import torch
from torch import nn

import loratory as lt
from tests.reference.vectors import Vectors


def llama(v: Vectors) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    m = v.settings["model"]
    config = LlamaConfig(
        hidden_size=m["hidden"],
        intermediate_size=m["intermediate"],
        num_attention_heads=m["heads"],
        num_key_value_heads=m["kv_heads"],
        vocab_size=m["vocab"],
        num_hidden_layers=m["layers"],
        rope_parameters={"rope_type": "default", "rope_theta": m["rope_theta"]},
        rms_norm_eps=m["rms_norm_eps"],
        tie_word_embeddings=m["tied"],
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict({name: v.given(f"base.{name}") for name in model.state_dict()})
    return model


def test_estimation_start_and_training():
    v = Vectors("lora-sb")
    r, alpha, options = v.settings["r"], v.settings["alpha"], dict(v.settings["optimizer"])
    optimizer_class = getattr(torch.optim, options.pop("name"))
    model, targets = llama(v), v.settings["targets"]
    train, probe = v.given("train_ids"), v.given("probe_ids")
    v.compare("base_logits", model(probe).logits)

    size = v.settings["estimation_batch"]
    batches = [{"input_ids": ids, "labels": ids} for ids in train.split(size)]
    seen = lt.collect(model, batches, where=targets, samples=v.settings["num_samples"])
    assert seen.samples == v.settings["num_samples"]
    steps = v.settings["epochs"] * math.ceil(len(train) / size)
    assert steps == v.settings["total_steps"]
    method = lt.LoRASB(rank=r, alpha=alpha).planned(
        learning_rate=options["lr"], warmup=v.settings["warmup_ratio"], steps=steps
    )
    torch.testing.assert_close(method.first_step, v.settings["eff_lr"])
    lt.adapt(model, method, targets, seen=seen)

    adapters = {n.removesuffix(".loratory"): m["default"] for n, m in model.named_modules() if n.endswith("loratory")}
    limit = v.about["tolerance"]["factors"]
    for name, t in adapters.items():
        G = seen.of(name).gradient
        v.compare(f"{name}.grad_sum", G)
        sure = v.tensors[f"{name}.grad_sum"].abs() >= 1e-6
        D = torch.where(sure, -method.first_step * G.sign(), v.tensors[f"{name}.dW"])
        v.compare(f"{name}.dW", D)
        tail = v.tensors[f"{name}.svd_exact"]
        v.compare(f"{name}.svd_exact", torch.linalg.svdvals(D))
        assert float((D - t.B @ t.R.detach() @ t.A).norm()) <= limit["frobenius"] * float(tail[r:].norm()) + 1e-9
        torch.testing.assert_close(t.R.diagonal().detach(), tail[:r], rtol=limit["singular_values"], atol=0)
        t.A, t.B, t.R = v.given(f"{name}.A"), v.given(f"{name}.B"), nn.Parameter(v.given(f"{name}.R_start"))
    assert lt.summary(model).trained == v.about["trainable_parameters"]

    optimizer = optimizer_class([t.R for t in adapters.values()], **options)
    for step in range(v.settings["steps"]):
        out = model(input_ids=probe, labels=probe)
        optimizer.zero_grad()
        out.loss.backward()
        if step == 0:
            v.compare("start_logits", out.logits)
            v.compare("loss0", out.loss)
            for name, t in adapters.items():
                v.compare(f"{name}.grad_R", t.R.grad)
        optimizer.step()
    for name, t in adapters.items():
        v.compare(f"{name}.R_end", t.R)
        v.compare(f"{name}.delta_end", t.method.delta(t))
    v.compare("end_logits", model(probe).logits)
    v.finish()
