import json
def cells(p): return json.load(open(p))
def save(p,nb):
    open(p,'w').write(json.dumps(nb,indent=1,ensure_ascii=False)+"\n")
def rep(nb,a,b):
    hits=[c for c in nb['cells'] if a in ''.join(c['source'])]
    assert len(hits)==1,(len(hits),a)
    src=''.join(hits[0]['source']); assert src.count(a)==1
    hits[0]['source']=src.replace(a,b).splitlines(keepends=True)
p='nbs/engines/05_grouped.ipynb'; nb=cells(p)
rep(nb,'''    mask, p = mask.bool().cpu(), mask.shape[1] - n
    rows = group.cpu().argsort(stable=True)
''','''    mask, group, p = mask.bool().cpu(), group.cpu(), mask.shape[1] - n
    rows = group.argsort(stable=True)
''')
rep(nb,'''    def attend(q, k, v, mask, causal):
        return sdpa_attention_forward(module, q, k, v, mask, dropout, scaling, causal)[0]

    if isinstance''','''    def attend(q, k, v, mask, causal):
        return sdpa_attention_forward(module, q, k, v, mask, dropout, scaling, causal)[0]

    query, key, value = _as_autocast(query, key, value)
    if isinstance''')
rep(nb,'''def grouped_attention(
    module,''','''def _as_autocast(*tensors):
    "What autocast would make of them; masks that are only described go past it"
    import torch

    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return [x.to(torch.get_autocast_dtype(kind)) for x in tensors]


def grouped_attention(
    module,''')
save(p,nb)
p='nbs/engines/10_fast.ipynb'; nb=cells(p)
src={id(c):''.join(c['source']) for c in nb['cells']}
rep(nb,'''        parts = _passes(mask, n, group, self.tokens_per_microbatch)
        if len(parts) == 1:''','''        parts = self._passes(mask, n, group)
        if len(parts) == 1:''')
rep(nb,'''    def _score_pass(self, model, ids, mask, n, group, fields):
''','''    def _passes(self, mask, n, group):
        "Rows of each pass; as many passes in all processes, for sharded weights are gathered by all in each."
        import torch

        p, most = mask.shape[1] - n, self.tokens_per_microbatch
        lengths = mask[:, :p].sum(1).tolist(), mask[:, p:].sum(1).tolist()
        mine = microbatches(group.tolist(), *lengths, most)
        count = 1
        if most:
            count = self.accelerator.gather(torch.tensor([len(mine)], device=mask.device)).max().item()
        while len(mine) < count:  # a process never has fewer rows than another has passes
            longest = max(range(len(mine)), key=lambda i: len(mine[i]))
            mine[longest : longest + 1] = mine[longest].tensor_split(2)
        return [rows.to(mask.device) for rows in mine]

    def _score_pass(self, model, ids, mask, n, group, fields):
''')
rep(nb,'''        "Rows of each pass; as many passes in all processes, for sharded weights are gathered by all in each."
        import torch

        if not self.tokens_per_microbatch or self._group is None or self._undivided():
            return []
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        n = inputs["completion_ids"].shape[1]
        mine = _passes(mask, n, self._group, self.tokens_per_microbatch)
        count = self.accelerator.gather(torch.tensor([len(mine)], device=mask.device)).max().item()
        while len(mine) < count:  # a process never has fewer rows than another has passes
            longest = max(range(len(mine)), key=lambda i: len(mine[i]))
            mine[longest : longest + 1] = mine[longest].tensor_split(2)
        return mine
''','''        "Rows of each pass; none if the batch stays whole."
        import torch

        if not self.tokens_per_microbatch or self._group is None or self._undivided():
            return []
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        return self._passes(mask, inputs["completion_ids"].shape[1], self._group)
''')
i=[c for c in nb['cells'] if 'def _passes(mask, n, group, most)' in ''.join(c['source'])]
assert len(i)==1
t=''.join(i[0]['source']); a=t.index('def _passes(mask, n, group, most)'); b=t.index('def _pad(')
i[0]['source']=(t[:a]+t[b:]).splitlines(keepends=True)
save(p,nb)
