# A compiled model while an allocator prunes it: one graph, and one more when ranks fall.
import torch
from allocation_models import assert_same_state, network, train, trained

OPTIONS = dict(total_steps=14, final_steps=4, warmup_steps=2, allocation_interval=2)


def test_a_pruning_run_recompiles_at_most_once():
    eager, reference = network(**OPTIONS)
    optimizer = torch.optim.AdamW(trained(eager), 0.02)
    reference.attach(optimizer)
    wanted = train(eager, optimizer, range(1, 20))

    graphs = []

    def counting(module, example):
        graphs.append(module)
        return module

    model, allocator = network(**OPTIONS)
    compiled = torch.compile(model, fullgraph=True, backend=counting)
    optimizer = torch.optim.AdamW(trained(model), 0.02)
    allocator.attach(optimizer)
    assert train(compiled, optimizer, range(1, 20)) == wanted
    assert len(set(allocator.ranks.values())) > 1 and len(graphs) <= 2
    assert_same_state(allocator.state_dict(), reference.state_dict())
