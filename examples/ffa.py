"""One call of the op: two packed documents, the first attended causally, the second in both directions.

python examples/ffa.py
"""

import torch

import magi_attention  # noqa: F401  (registers torch.ops.magi)

q = torch.randn(10, 8, 64, requires_grad=True)  # [tokens, query heads, head_dim]
k, v = torch.randn(2, 10, 2, 64).unbind()  # [tokens, key/value heads, head_dim]
documents = torch.tensor([[0, 4], [4, 10]], dtype=torch.int32)
full, causal = 0, 1
types = torch.tensor([causal, full], dtype=torch.int32)
out, lse = torch.ops.magi.ffa(q, k, v, documents, documents, types)  # rows of a document see its own keys
(out.sum() + lse.sum()).backward()
print(f"out {list(out.shape)}, lse {list(lse.shape)}, |dq| {q.grad.norm():.4f}")
