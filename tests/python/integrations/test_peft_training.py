# A training of PEFT models, stock and accelerated: the same losses over 100 float32 steps.
import copy

import peft
import pytest
import torch
from peft_models import bert, calls, gpt2, llama

import rankwise.integrations.peft as rp

STEPS = 100
LORA = dict(r=4, lora_alpha=8)
ADALORA = dict(init_r=4, target_r=2, total_step=STEPS, tinit=10, tfinal=30, deltaT=5)
MODELS = {
    "bert": (bert, ["query", "value", "word_embeddings"], ["query", "value"]),
    "gpt2": (gpt2, ["c_attn", "wte"], ["c_attn"]),
    "llama": (llama, "all-linear", ["q_proj", "down_proj"]),
}


def losses(model, adalora: bool) -> list[float]:
    random = torch.Generator().manual_seed(3)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    found = []
    for step in range(STEPS):
        tokens = torch.randint(0, 40, (4, 8), generator=random)
        labels = tokens if model.config.model_type != "bert" else tokens[:, 0] % 2
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        if adalora:
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("method", ["lora", "adalora"])
@pytest.mark.parametrize("name", MODELS)
def test_the_losses_of_peft(name, method):
    build, of_lora, of_adalora = MODELS[name]
    task = "SEQ_CLS" if name == "bert" else "CAUSAL_LM"
    if method == "lora":
        config = peft.LoraConfig(target_modules=of_lora, task_type=task, **LORA)
    else:
        config = peft.AdaLoraConfig(target_modules=of_adalora, task_type=task, **ADALORA)
    stock = peft.get_peft_model(build(), config)
    ours = copy.deepcopy(stock)
    report = rp.accelerate(ours)
    expected = losses(stock, method == "adalora")
    assert losses(ours, method == "adalora") == pytest.approx(expected, rel=1e-5)
    assert not report.left and set(calls(ours)) == {"fused"}
    for (n, mine), other in zip(ours.named_parameters(), stock.parameters(), strict=True):
        if n.endswith("lora_E.default"):
            assert torch.equal(mine != 0, other != 0)
