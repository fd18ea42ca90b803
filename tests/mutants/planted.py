"""Wrong formulas that the tests must catch: what is wrong, the file, (right, wrong) texts, and the tests that run against it.

Those of a method's file stand in its test file as PLANTED: (what is wrong, right, wrong[, tests other than that file]).
"""

import ast
from pathlib import Path
from typing import NamedTuple

LAWS, METHODS, OPS, SITES, RUN = (
    "tests/laws/test_laws.py",
    "tests/methods/",
    "tests/ops/",
    "tests/sites/",
    "tests/runtime/",
)
LORA, DORA, MERGED = (METHODS + f"test_{n}.py" for n in ("lora", "dora", "merged_lora"))
ROWS, EVERY_METHOD = RUN + "test_rows.py", "::test_every_method_on_every_layer"
PACKING = "tests/tasks/test_packing.py"
LEAN = RUN + "test_lean_loss.py"
GROUPS = RUN + "test_row_groups.py"
BASELINES = "tests/laws/test_baselines.py"
PROMPT, PREFIX = (METHODS + f"test_{n}_tuning.py" for n in ("prompt", "prefix"))
BLOCK, BODIES = "tests/runtime/test_block.py", "tests/laws/test_bodies.py"
VISION = "tests/runtime/test_vision.py"
STATISTICS, CLAIMS = "tests/compare/test_statistics.py", "tests/catalogue/test_claims.py"
PLANNED, PLAN = (f"tests/plan/test_{n}.py" for n in ("memory", "parts"))
LIVE, FIT = (
    PLANNED + "::test_peak_is_what_the_allocator_reports",
    "tests/plan/test_command.py::test_what_fits_is_listed_best_first",
)
START = BODIES + "::test_from_token_ids_the_model_starts_as_after_these_tokens"


class Mutant(NamedTuple):
    wrong: str
    file: str  # under src/loratory
    edits: tuple[tuple[str, str], ...]
    tests: tuple[str, ...]


def plant(wrong: str, file: str, right: str, instead: str, *tests: str) -> Mutant:
    return Mutant(wrong, file, ((right, instead),), tests)


def planted_in(test: Path) -> list[Mutant]:
    """The wrong formulas that a method's test file lists, read without importing it."""
    method = f"methods/{test.stem.removeprefix('test_')}.py"
    for node in ast.parse(test.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PLANTED":
            own = f"{METHODS}{test.name}"
            return [plant(row[0], method, row[1], row[2], *(row[3:] or [own])) for row in ast.literal_eval(node.value)]
    return []


PLANTED = [
    *(mutant for test in sorted(Path(__file__).parents[1].glob("methods/test_*.py")) for mutant in planted_in(test)),
    # switching
    *(
        plant(wrong, "serve/switch.py", right, instead, "tests/serve/test_switch.py")
        for wrong, right, instead in (
            ("mixing weight left out", "D if m == 1 else m * D", "D"),
            ("entries of a stack taken for one", "matrix * torch.arange", "0 * torch.arange"),
            ("only the last value where places coincide", "index_add_(0, which, D)", "index_copy_(0, which, D)"),
            ("an interruption leaves what was written", "put_back(model, state, layers)", "pass"),
            ("the adapter before stays", "if state.merged:", "if not names:"),
        )
    ),
    plant(
        "places of the other order", "sites/site.py", "if W.is_contiguous():", "if True:", "tests/serve/test_switch.py"
    ),
    plant(
        "the base with what was switched",
        "runtime/layer.py",
        ".scatter(0, self.unmerged_at, self.unmerged)",
        "",
        "tests/serve/test_switch.py",
    ),
    *(
        plant(wrong, "ops/orthogonality.py", right, instead, OPS + "test_orthogonality.py")
        for wrong, right, instead in (
            ("norms exchanged", '"fro" if norm == "frobenius" else 2', '2 if norm == "frobenius" else "fro"'),
            ("inputs for outputs in the ratio", "1 - ((first.mT @ second)", "1 - ((first @ second.mT)"),
            ("inputs for outputs in the norm", "matrix_norm(first.mT @ second", "matrix_norm(first @ second.mT"),
            ("density for ratio", "return 1 - ((first", "return ((first"),
        )
    ),
    # methods
    plant(
        "Kaiming bound from the outputs", "methods/start.py", "math.sqrt(site.inputs)", "math.sqrt(site.outputs)", LORA
    ),
    plant("Gaussian start too wide", "methods/start.py", "std=1 / rank", "std=1 / math.sqrt(rank)", LORA),
    plant(
        "embedding starts like a linear layer",
        "methods/start.py",
        "return A.zero_(), B.normal_(generator=site.generator)",
        "return A.normal_(generator=site.generator), B.zero_()",
        LORA,
    ),
    plant(
        "start that changes the function",
        "methods/start.py",
        "generator=site.generator), B.zero_()\n    bound",
        "generator=site.generator), B.fill_(0.1)\n    bound",
        LAWS + "::test_function_is_unchanged_at_the_start",
    ),
    Mutant(
        "gradient through the row length",
        "methods/dora.py",
        (("with torch.no_grad():", "with torch.enable_grad():"), ("vector_norm(V.detach(),", "vector_norm(V,")),
        (DORA,),
    ),
    plant("full fine-tuning trains nothing", "methods/baselines.py", '] = "all"', '] = "nothing"', BASELINES),
    plant("head-only trains everything", "methods/baselines.py", '] = "head"', '] = "all"', BASELINES),
    plant("frozen trains the head", "methods/baselines.py", '] = "nothing"', '] = "head"', BASELINES),
    plant(
        "diagonal core on the outputs",
        "methods/method.py",
        "B * core.unsqueeze(-2)",
        "B * core.flip(-1).unsqueeze(-2)",
        METHODS + "test_method.py",
    ),
    plant(
        "update subtracted when merging",
        "methods/method.py",
        "return W + self.delta(t)",
        "return W - self.delta(t)",
        LAWS + "::test_merge_equals_forward",
    ),
    plant(
        "highest rung instead of the lowest",
        "methods/method.py",
        "max(stated, default=0)",
        "min(stated, default=0)",
        DORA,
    ),
    plant(
        "rank 0 allowed",
        "methods/fields.py",
        "if value < 1:",
        "if value < 0:",
        LORA,
    ),
    plant("dropout 1 allowed", "methods/fields.py", ' or (value == 1 and interval[-1] == ")")', "", LORA),
    # ops
    plant(
        "identity not shared among slices",
        "ops/tensor_ring.py",
        "1 / R, device",
        "1.0, device",
        METHODS + "test_tlora.py",
    ),
    plant(
        "gauges without their trace", "ops/tensor_ring.py", "gauges[0] / closed", "gauges[0]", METHODS + "test_tlora.py"
    ),
    plant("high pass at every level", "ops/wavelet.py", 'band if i == 0 else "L"', "band", METHODS + "test_wara.py"),
    plant("documents of a packed row see each other", "ops/masks.py", "mask & (documents", "mask | (documents", OPS),
    plant("continued row sees one token less", "ops/masks.py", ".tril(seen)", ".tril(seen - 1)", OPS),
    *(
        plant(wrong, "ops/low_rank.py", right, instead, OPS + "test_low_rank.py")
        for wrong, right, instead in (
            ("half of the update", "B.t(), alpha=s)", "B.t(), alpha=s / 2)"),
            ("gradient of A from the undropped input", "kept = (u,) if source", "kept = (x,) if source"),
            ("gradient of B scaled", "_times(g.t() @ _rows(parts[i]), scales[i])", "g.t() @ _rows(parts[i])"),
            ("gradient of the dropped input added to x", "(dx if ctx.own else", "(dx if not ctx.own else"),
            ("gradient of the dropped input through W", "du = (gB @ A)", "du = (gs[0] @ weights[0])"),
            ("gradient of A without the scale", "_times(gs[i] @ Bs[i], scales[i])", "gs[i] @ Bs[i]"),
            ("gradient of the bias averaged", "g.sum(0)", "g.mean(0)"),
            (
                "gradient of W from the dropped input",
                "x if own and needs_weight else None",
                "u if own and needs_weight else None",
            ),
            ("definition without dropout", "F.linear(x if u is None else u, A)", "F.linear(x, A)"),
            ("second derivative silently wrong", "if torch.is_grad_enabled():", "if False:"),
            (
                "the last sibling alone gives x its gradient",
                "if dx is None else dx.addmm_(",
                "if dx is None or i else dx.addmm_(",
            ),
            (
                "siblings' gradients of A in another order",
                "for i, d in zip(here, dA,",
                "for i, d in zip(here[::-1], dA,",
            ),
            (
                "an unused sibling gets a gradient of zeros",
                "ctx.set_materialize_grads(False)",
                "ctx.set_materialize_grads(True)",
            ),
            ("a narrow copy is always kept", "m.weight if m.cast_again else m.weight.to(dtype)", "m.weight.to(dtype)"),
            ("a narrow copy is never kept", "m.weight if m.cast_again else m.weight.to(dtype)", "m.weight"),
        )
    ),
    *(
        plant(wrong, "ops/made_again.py", right, instead, OPS + "test_made_again.py")
        for wrong, right, instead in (
            ("made again without autocast", "dtype=dtype, enabled=enabled)", "dtype=dtype, enabled=False)"),
            (
                "gradients to the inputs in another order",
                "zip(ctx.saved_tensors, wanted,",
                "zip(ctx.saved_tensors[::-1], wanted,",
            ),
            (
                "kept inputs that nobody watches",
                "tuple(x.detach() for x in inputs)",
                "tuple(x.detach().clone() for x in inputs)",
            ),
            (
                "second derivative of what is made again",
                "if torch.is_grad_enabled():\n            raise RuntimeError(SECOND)\n        wanted",
                "if False:\n            raise RuntimeError(SECOND)\n        wanted",
            ),
            (
                "second derivative of a product",
                "if torch.is_grad_enabled():\n            raise RuntimeError(SECOND)\n        x, *tensors",
                "if False:\n            raise RuntimeError(SECOND)\n        x, *tensors",
            ),
            (
                "gradient of the input without the matrix made again",
                "g @ ctx.make().to(g.dtype)",
                "g @ ctx.make().to(g.dtype).abs()",
            ),
            ("an origin where nothing is kept", "or not torch.is_grad_enabled()", "or False"),
        )
    ),
    *(
        plant(wrong, "runtime/fuse.py", right, instead, RUN + "test_fuse.py")
        for wrong, right, instead in (
            ("outputs of another input", "waiting.x is x and", "waiting.x is not None and"),
            (
                "outputs of an input before its change",
                "version = -1 if x.is_inference() else x._version",
                "version = -1",
            ),
            ("outputs without gradient handed out with one", "version, torch.is_grad_enabled(),", "version,"),
            (
                "another sibling's output",
                "dict(enumerate(low_rank_linears(x, members)))",
                "dict(enumerate(low_rank_linears(x, members[::-1])))",
            ),
            ("layers never part", "if self.missed == MISSES:", "if False:"),
            ("layers part at once", "MISSES = 2", "MISSES = 1"),
            ("siblings with dropout", "and not layer.active[0].method.input_dropout", ""),
            ("outputs are copied with the model", 'self.__dict__ | {"round": None}', "self.__dict__"),
            ("offloaded weights", '"_hf_hook" in module.__dict__ or ', ""),
            ("large ranks stacked", "> layer.site.inputs:", "> 10**9:"),
        )
    ),
    *(
        plant(wrong, "runtime/lean_activations.py", right, instead, RUN + "test_fuse.py")
        for wrong, right, instead in (
            (
                "gate and up change places",
                "self.gate_proj(x), self.up_proj(x)))",
                "self.up_proj(x), self.gate_proj(x)))",
            ),
            (
                "a trained norm is made again",
                "and not trained and not",
                "and not",
            ),
            ("an activation that writes into its input", 'or getattr(module, "inplace", False)', ""),
            ("closed, and still on", "module.__dict__.pop(LEAN, None)", "pass"),
        )
    ),
    # sites
    plant("groups ignored", "sites/conv.py", "groups=groups)", "groups=1)", SITES),
    plant(
        "lengths along the wrong axis",
        "sites/conv.py",
        "v.reshape(-1, *(1,) * (self.weight.dim() - 2))",
        "v.reshape(*(1,) * (self.weight.dim() - 2), -1)",
        SITES,
    ),
    plant(
        "kernel transposed",
        "sites/conv.py",
        "self.weight.copy_(W.reshape(self.weight.shape))",
        "self.weight.copy_(W.reshape(self.weight.shape).flip(-1))",
        SITES,
    ),
    plant(
        "embedding scale left out of the weight",
        "sites/embedding.py",
        "self._look_up(x, W) * self._scale(W)",
        "self._look_up(x, W)",
        SITES,
    ),
    plant(
        "embedding scale left out of the update",
        "sites/embedding.py",
        "F.linear(h, B) * self._scale(B)",
        "F.linear(h, B)",
        SITES,
    ),
    plant("padding row trained", "sites/embedding.py", "m.padding_idx", "None", SITES),
    plant("largest rank off by one", "sites/site.py", "if asked > most:", "if asked >= most:", SITES),
    plant("ids cut too early", "sites/block.py", "-(-count // len(ids))", "(count // len(ids))", PROMPT),
    # runtime
    plant(
        "real tokens keep their positions under a prefix",
        "runtime/block.py",
        'call["position_ids"] = call["position_ids"] + tokens',
        'call["position_ids"] = call["position_ids"]',
        START,
    ),
    plant(
        "given positions keep under a prompt",
        "runtime/block.py",
        "positions = positions + n",
        "positions = positions + 0",
        BLOCK,
    ),
    plant(
        "outputs of virtual tokens kept",
        "runtime/block.py",
        "out[key] = value[:, n:]",
        "out[key] = value[:, : value.shape[1] - n]",
        START,
    ),
    plant(
        "virtual tokens see what comes after",
        "runtime/block.py",
        "visible = visible & (places[:n] <= rows[:, None])",
        "pass",
        BLOCK + "::test_every_document_of_a_packed_row_sees_the_virtual_tokens",
    ),
    plant(
        "prompt hidden from later tokens",
        "runtime/cache.py",
        "(length + self.n, 0)",
        "(length, 0)",
        BLOCK + "::test_a_row_in_two_pieces_is_a_whole_row",
    ),
    plant(
        "cache counts virtual tokens",
        "runtime/cache.py",
        "key_states, value_states = key_states[:, :, n:], value_states[:, :, n:]",
        "n = 0",
        BLOCK + "::test_a_row_in_two_pieces_is_a_whole_row",
    ),
    plant("the body's own mask stays", "runtime/vision.py", "if 0 < self.mask < len(args):", "if False:", VISION),
    plant(
        "prompts behind the patches' first",
        "runtime/vision.py",
        "[x[:, :1], P.to(x.dtype), x[:, 1 + old :]]",
        "[x[:, :2], P.to(x.dtype), x[:, 2 + old :]]",
        VISION + "::test_virtual_tokens_stand_between_class_token_and_patches_in_every_block",
    ),
    plant(
        "deep prompts added to the old ones",
        "runtime/vision.py",
        "old = t.method.tokens if self.block else 0",
        "old = 0",
        VISION + "::test_virtual_tokens_stand_between_class_token_and_patches_in_every_block",
    ),
    plant(
        "a patch cut off in a prompt's place",
        "runtime/vision.py",
        "x.narrow(dim, 1 + n, x.shape[dim] - 1 - n)",
        "x.narrow(dim, n, x.shape[dim] - 1 - n)",
        VISION + "::test_outputs_have_no_entries_of_virtual_tokens",
    ),
    plant(
        "a frozen body that drops",
        "runtime/vision.py",
        "module.training = False",
        "pass",
        VISION + "::test_the_frozen_body_drops_nothing",
    ),
    plant(
        "other adapters put to rest with the body",
        "runtime/vision.py",
        "if name and not around and not is_ours(name):",
        "if name and not around:",
        VISION + "::test_the_frozen_body_drops_nothing",
    ),
    plant(
        "mix ignores the base",
        "runtime/route.py",
        "method.weight(t, W) - W)",
        "method.weight(t, W))",
        METHODS + "test_method.py",
    ),
    plant(
        "mix without dropout on rung 2",
        "runtime/route.py",
        "site.apply(u, method.delta",
        "site.apply(x, method.delta",
        METHODS + "test_method.py",
    ),
    plant(
        "factors as large as the weight kept",
        "runtime/route.py",
        "            layer.route = wide_route",
        "            pass",
        METHODS + "test_method.py",
    ),
    plant(
        "rung 2 without dropout",
        "ops/recomputed_delta.py",
        "product(u, site, delta, tensors, alone=True)",
        "product(x, site, delta, tensors, alone=True)",
        METHODS + "test_method.py",
    ),
    plant(
        "mix counts the base again", "runtime/route.py", "base, site) - y0)", "base, site))", METHODS + "test_method.py"
    ),
    plant(
        "mixing weight left out",
        "runtime/route.py",
        "y = y + m * site.up(",
        "y = y + site.up(",
        LAWS + "::test_mixing_is_the_weighted_sum_of_the_changes",
    ),
    plant("dropout outside training", "runtime/route.py", "if p and t.training else x", "if p else x", LORA),
    plant(
        "mixed copies count the base again",
        "runtime/route.py",
        "m * (getattr(c, name) - p)",
        "m * getattr(c, name)",
        BASELINES,
    ),
    plant(
        "weights merged without the mix",
        "runtime/merge.py",
        "out += m * (t.method.weight(t, W) - W)",
        "out += t.method.weight(t, W) - W",
        LAWS + "::test_mixing_is_the_weighted_sum_of_the_changes",
    ),
    plant(
        "base not kept",
        "sites/site.py",
        "return self.read().detach().clone()",
        "return self.read().detach()",
        LAWS + "::test_detach_restores_the_base",
    ),
    plant(
        "adapter counted twice after a merge",
        "runtime/merge.py",
        "            for each in group:\n                rest(each)\n",
        "",
        LAWS + "::test_merge_equals_forward",
    ),
    plant(
        "merge check that is blind",
        "runtime/merge.py",
        "relative = maximum / span if span > 0",
        "relative = 0.0 if span > 0",
        RUN + "test_merge.py",
    ),
    plant("rate divided", "runtime/summary.py", "lr * (tag.lr if", "lr / (tag.lr if", LORA),
    plant(
        "trainable flags forgotten",
        "runtime/attach.py",
        "p.requires_grad_(state.trainable.get(n, True))",
        "p.requires_grad_(True)",
        LAWS + "::test_detach_restores_the_base",
    ),
    plant(
        "expression matched at its start only",
        "runtime/where.py",
        "if pattern.fullmatch(name)",
        "if pattern.match(name)",
        RUN + "test_where.py",
    ),
    plant(
        "names matched inside words",
        "runtime/where.py",
        'name.endswith("." + key)',
        "name.endswith(key)",
        RUN + "test_where.py",
    ),
    plant(
        "layers without gradient not reported",
        "runtime/reach.py",
        "if p.grad is None}",
        "if False}",
        RUN + "test_contracts.py",
    ),
    # rows
    plant("factors of the row before", "sites/linear.py", "A[which].mT", "A[which.roll(1)].mT", ROWS + EVERY_METHOD),
    plant(
        "look-up in the first adapter's table",
        "sites/embedding.py",
        "ids + vocab * which.unsqueeze(1)",
        "ids",
        ROWS + EVERY_METHOD,
    ),
    plant(
        "gradient for padding",
        "sites/embedding.py",
        "h.detach(), h)",
        "h, h)",
        ROWS + "::test_padding_ids_of_an_embedding_get_no_gradient",
    ),
    plant(
        "rows of a convolution mixed",
        "sites/conv.py",
        "flat = x.reshape(1, -1, *x.shape[2:])",
        "flat = x.flip(0).reshape(1, -1, *x.shape[2:])",
        ROWS + EVERY_METHOD,
    ),
    plant("rows not put back in order", "runtime/row_route.py", ".index_select(0, at.back)", "", ROWS + EVERY_METHOD),
    plant(
        "stale factors",
        "runtime/row_route.py",
        "self._stacked[0] == state",
        "True",
        ROWS + "::test_factors_kept_between_calls_follow_what_is_written_to_them",
    ),
    plant(
        "sequences of a row tiled",
        "runtime/row_route.py",
        "n for n in route.numbers for _ in range(copies)",
        "n for _ in range(copies) for n in route.numbers",
        ROWS + "::test_sampled_sequences_keep_their_rows_adapter",
    ),
    plant(
        "groups not put back in order",
        "runtime/divide.py",
        "torch.cat(list(parts), d).index_select(d, back)",
        "torch.cat(list(parts), d)",
        GROUPS + "::test_virtual_tokens_of_each_row",
    ),
    plant(
        "sequences of a group tiled",
        "runtime/divide.py",
        "for i in rows for k in range(copies)",
        "for k in range(copies) for i in rows",
        GROUPS + "::test_generate",
    ),
    plant(
        "rows of another group",
        "runtime/divide.py",
        "groups.rows[g], device",
        "groups.rows[g - 1], device",
        GROUPS + "::test_a_layer_that_turns_out_to_hide_its_rows",
    ),
    plant(
        "user's cache not filled",
        "runtime/row_groups.py",
        "put_cache(kwargs[key], join([c[key] for c in caches], groups))",
        "pass",
        GROUPS + "::test_a_row_in_two_pieces_is_a_whole_row",
    ),
    plant(
        "groups count in one cache",
        "runtime/divide.py",
        "if t.dim() else t.clone()",
        "if t.dim() else t",
        GROUPS + "::test_generate",
    ),
    plant(
        "prompt of another group kept",
        "runtime/divide.py",
        "{KEPT: kept[g]}",
        "{KEPT: kept[0]}",
        GROUPS + "::test_a_row_in_two_pieces_is_a_whole_row",
    ),
    plant(
        "loss of the first group",
        "runtime/row_groups.py",
        "loss_args, loss_kwargs = join(calls, groups)",
        "loss_args, loss_kwargs = calls[0]",
        GROUPS + "::test_a_loss_is_that_of_the_whole_batch",
    ),
    plant(
        "recomputed with the adapters of after",
        "runtime/row_groups.py",
        "return original(again, *args, **kwargs)",
        "return original(function, *args, **kwargs)",
        GROUPS + "::test_gradient_checkpointing_recomputes_each_group_as_it_was",
    ),
    plant(
        "cache not restored before a second try",
        "runtime/row_groups.py",
        "put_cache(cache, kept[key])",
        "pass",
        GROUPS + "::test_a_cache_is_as_it_was_when_a_call_starts_again",
    ),
    # plan
    plant(
        "what is released still counts", "plan/ledger.py", "total += sign * record.bytes", "total += record.bytes", LIVE
    ),
    plant(
        "states of the optimizer left out", "plan/trace.py", "ledger.peak(lambda phase: states)", "ledger.peak()", LIVE
    ),
    plant("base counted as trained", "plan/trace.py", "if key in base]", "if key not in base]", LIVE),
    plant("batches are not accumulated", "plan/memory.py", "min(2, job.accumulation)", "1", LIVE),
    plant(
        "a convolution copies nothing",
        "plan/kernels.py",
        "if func is aten.convolution.default:",
        "if False:",
        PLAN + "::test_a_convolution_copies_what_it_copies",
    ),
    plant(
        "weights of the file not counted",
        "plan/memory.py",
        "if p.dtype != stored)",
        "if p.dtype == stored)",
        PLANNED + "::test_weights_stored_in_another_format_are_held_twice_while_they_load",
    ),
    plant(
        "one state of two",
        "plan/optimizers.py",
        'Optimizer("adamw_torch_fused", _copies(2))',
        'Optimizer("adamw_torch_fused", _copies(1))',
        PLAN,
    ),
    plant(
        "rows counted for columns",
        "plan/optimizers.py",
        "t.numel() // t.shape[-1] + t.numel() // t.shape[-2]",
        "2 * (t.numel() // t.shape[-1])",
        PLAN,
    ),
    plant(
        "header not filled up", "plan/file.py", "-(-text // 8) * 8", "text", PLAN + "::test_file_is_as_large_as_saved"
    ),
    plant("buckets on one device", "plan/devices.py", 'found["gradients"] += gradients', "pass", PLAN),
    plant(
        "whole weights of one block", "plan/devices.py", "min(2, blocks.count) * blocks.largest", "blocks.largest", PLAN
    ),
    plant("line from the wrong end", "plan/depth.py", "(job.depth - DEPTHS[0])", "(job.depth - DEPTHS[-1])", PLAN),
    plant("traffic not timed", "plan/clock.py", " + moved / self.bytes", "", PLAN),
    plant("gravest changes first", "train/fit.py", "return packed, ", "return -packed, ", FIT),
    plant(
        "the largest batch that does not fit",
        "plan/memory.py",
        "    return low\n",
        "    return low + 1\n",
        PLANNED + "::test_the_largest_batch_fits_and_the_next_does_not",
    ),
    plant(
        "pieces counted once",
        "ops/recomputed.py",
        "_tell(len(pieces) - 1)",
        "_tell(1)",
        PLAN + "::test_pieces_that_are_left_out_are_counted",
    ),
    # combining and export
    plant(
        "weights vote",
        "ops/task_arithmetic.py",
        '(tensors if sign == "total" else signs)',
        '(weights.reshape(-1, 1) * tensors if sign == "total" else signs)',
        OPS + "test_task_arithmetic.py",
    ),
    plant(
        "mean over all adapters",
        "ops/task_arithmetic.py",
        "agree.sum(0).clamp(min=1)",
        "len(tensors)",
        OPS + "test_task_arithmetic.py",
    ),
    plant(
        "not rescaled after dropping",
        "ops/task_arithmetic.py",
        "kept.to(tensor.device) / density",
        "kept.to(tensor.device)",
        OPS + "test_task_arithmetic.py",
    ),
    plant(
        "smallest values kept",
        "runtime/low_rank.py",
        "U[..., :rank], s[..., :rank], Vh[..., :rank, :]",
        "U[..., -rank:], s[..., -rank:], Vh[..., -rank:, :]",
        RUN + "test_combine.py::test_a_lower_rank_is_the_nearest",
    ),
    plant(
        "error of the kept part",
        "runtime/low_rank.py",
        "float(s[..., rank:].norm())",
        "float(s[..., :rank].norm())",
        RUN + "test_combine.py::test_a_lower_rank_is_the_nearest",
    ),
    plant(
        "sign on both factors", "runtime/combine.py", "signed.abs(), how", "signed, how", "tests/oracle/test_combine.py"
    ),
    plant(
        "halves not interleaved",
        "store/gguf.py",
        ".transpose(1, 2).reshape(B.shape)",
        ".reshape(B.shape)",
        "tests/store/test_gguf.py",
    ),
    plant(
        "keys permuted by the number of queries",
        "store/gguf.py",
        'if part == "attn_k":',
        "if False:",
        "tests/store/test_gguf.py",
    ),
    plant("one scale for all ranks", "store/gguf.py", "B * (A.shape[-2] / alpha)", "B", "tests/store/test_gguf.py"),
    # comparisons
    plant(
        "rows' variance not of their mean",
        "compare/statistics.py",
        "by_row.var(ddof=1) / rows",
        "by_row.var(ddof=1) / seeds",
        STATISTICS,
    ),
    plant(
        "seeds' variance biased",
        "compare/statistics.py",
        "by_seed.var(ddof=1) / seeds",
        "by_seed.var(ddof=0) / seeds",
        STATISTICS,
    ),
    plant(
        "what rows explain counted twice", "compare/statistics.py", "max(of_seeds - own, 0.0)", "of_seeds", STATISTICS
    ),
    plant(
        "normal interval for few seeds",
        "compare/statistics.py",
        "t.ppf((1 + LEVEL) / 2, freedom) / norm",
        "norm.ppf((1 + LEVEL) / 2) / norm",
        STATISTICS,
    ),
    plant(
        "seeds left out of the interval", "compare/statistics.py", "@ deviations * keep", "@ deviations * 0", STATISTICS
    ),
    plant("one-sided p", "compare/statistics.py", "float(2 * t.sf(", "float(t.sf(", STATISTICS),
    plant(
        "Bonferroni instead of Holm",
        "compare/statistics.py",
        "(len(values) - place) * values[index]",
        "len(values) * values[index]",
        STATISTICS,
    ),
    plant(
        "Holm's values may fall",
        "compare/statistics.py",
        "largest = max(largest, min(1.0, (len(values) - place) * values[index]))",
        "largest = min(1.0, (len(values) - place) * values[index])",
        STATISTICS,
    ),
    plant(
        "the baseline's pairs corrected over all",
        "compare/statistics.py",
        "for family in (values, {pair: p for pair, p in values.items() if baseline in pair}):",
        "for family in (values,):",
        STATISTICS,
    ),
    plant(
        "the best's pairs corrected as if it had been named before",
        "compare/statistics.py",
        "judged = corrected(p_values(comparison.methods, found), comparison.baseline)",
        "judged = corrected({k: p for k, p in p_values(comparison.methods, found).items() if against in k}, against)",
        STATISTICS,
    ),
    plant(
        "pairs of different seeds",
        "compare/statistics.py",
        "np.subtract(first[seed], second[seed])",
        "np.subtract(first[seed], second[common[0]])",
        STATISTICS,
    ),
    plant(
        "every rate is measured",
        "compare/statistics.py",
        "run.method == method and run.learning_rate == rate and run.status",
        "run.method == method and run.status",
        STATISTICS,
    ),
    plant(
        "better and worse confused",
        "compare/statistics.py",
        '"better" if (row.estimate.value > 0) == comparison',
        '"worse" if (row.estimate.value > 0) == comparison',
        STATISTICS,
    ),
    # claims
    plant(
        "verdict without its interval",
        "catalogue/claim.py",
        "if number is None:\n            return False",
        "if number is None:\n            return True",
        CLAIMS,
    ),
    plant("limits left out", "catalogue/claim.py", "number >= self.least", "number > self.least", CLAIMS),
    plant(
        "not seen called differs",
        "catalogue/claim.py",
        "self.differs is None or self.differs.met(found)",
        "True",
        CLAIMS,
    ),
    plant("Adam's moments not counted", "catalogue/counts.py", "ADAM_STATES = 2", "ADAM_STATES = 1", CLAIMS),
    plant(
        "second minus first",
        "catalogue/versus.py",
        "paired(found[sides[0]], found[sides[1]])",
        "paired(found[sides[1]], found[sides[0]])",
        CLAIMS,
    ),
    plant("worst on dev", "catalogue/versus.py", "return max(means, key", "return min(means, key", CLAIMS),
    plant(
        "results of an old wording count",
        "catalogue/ledger.py",
        'result["claim"] == claim.digest',
        'result["claim"] != ""',
        CLAIMS,
    ),
    # starts from spectra and data, shared tensors, training-time methods
    plant(
        "a damaged file is believed",
        "ops/spectral.py",
        "if told != _digest(tensors) or",
        "if",
        OPS + "test_spectral.py",
    ),
    plant("kinds share a file", "ops/spectral.py", "{kind} {rank} {tuple", "{rank} {tuple", OPS + "test_spectral.py"),
    plant(
        "error of the kept part of a spectrum",
        "ops/spectral.py",
        "1 - float(s.double()",
        "float(s.double()",
        OPS + "test_spectral.py",
    ),
    plant(
        "batches not weighed by their rows",
        "runtime/collect.py",
        "samples: gradient / samples",
        "samples: gradient",
        RUN + "test_collect.py",
    ),
    plant(
        "signs of gradients kept",
        "runtime/collect.py",
        "(gradient / samples).abs()",
        "gradient / samples",
        METHODS + "test_shira.py",
    ),
    plant("passes see other draws", "runtime/collect.py", "                again()\n", "", RUN + "test_collect.py"),
    plant(
        "last batch whole",
        "runtime/collect.py",
        "batch, size = _head(batch, size, left), left",
        "pass",
        RUN + "test_collect.py",
    ),
    plant(
        "gradients left in the weights",
        "runtime/collect.py",
        "            p.grad = None\n            reached",
        "            reached",
        RUN + "test_collect.py",
    ),
    plant(
        "shared tensors registered in each layer",
        "runtime/layer.py",
        'self.__dict__["pool"] = pool',
        "self.pool = pool",
        RUN + "test_shared.py",
    ),
    plant(
        "shared tensors stay after a merge",
        "runtime/merge.py",
        "    drop_pools(model, state.adaptations)\n",
        "",
        RUN + "test_shared.py",
    ),
    plant("another basis is accepted", "store/rebuilt.py", "or made != told", "", METHODS + "test_randlora.py"),
    plant("resting tensors stepped", "runtime/drive.py", "tensor.grad = None", "pass", RUN + "test_drive.py"),
    plant("held columns stepped", "runtime/drive.py", "part.copy_(was)", "pass", RUN + "test_drive.py"),
    plant("held for good", "runtime/drive.py", "run.held.clear()", "pass", RUN + "test_drive.py"),
    plant("a restored run keeps what it kept", "runtime/drive.py", "run.kept.clear()", "pass", RUN + "test_drive.py"),
    plant(
        "settings of its own overridden",
        "runtime/attach.py",
        "for layer, site in sites.items() if methods[layer] == method",
        "for layer, site in sites.items()",
        METHODS + "test_lamda.py",
    ),
    plant(
        "steps counted before the method acts",
        "runtime/drive.py",
        "self.generators[name] = run.generator.get_state()",
        "self.generators.setdefault(name, run.generator.get_state())",
        RUN + "test_drive.py",
    ),
    plant(
        "gradient of the input without the update",
        "ops/recomputed_delta.py",
        "site.input_gradient(g, x, _whole(site, ctx.delta, tensors, ctx.alone))",
        "site.input_gradient(g, x, site.read())",
        OPS + "test_recomputed_delta.py",
    ),
    plant(
        "W counted twice",
        "ops/recomputed_delta.py",
        "    if alone:\n        return D\n",
        "",
        OPS + "test_recomputed_delta.py",
    ),
    *(
        plant(wrong, "ops/allocation.py", right, instead, OPS + "test_allocation.py")
        for wrong, right, instead in (
            ("smallest score has the largest rank", "key=lambda i: -scores[i]", "key=lambda i: scores[i]"),
            ("budget of ranks not looked at", "if sum(more) <= left * mean", "if True"),
            (
                "what is left goes in equal parts",
                "scores[i] / total if total > 0 else 1 / len(open_)",
                "1 / len(open_)",
            ),
            ("more than a matrix has", "room[i] - kept[i])", "left)"),
            ("floors not taken off", "volume - sum(floors)", "volume"),
        )
    ),
    plant(
        "ring not closed",
        "ops/tensor_ring.py",
        '"...ijab,...klba->...ikjl"',
        '"...ijab,...klbc->...ikjl"',
        METHODS + "test_tlora.py",
    ),
    plant(
        "index order of the ring",
        "ops/tensor_ring.py",
        "->...ikjlac",
        "->...kiljac",
        METHODS + "test_tlora.py",
    ),
    plant(
        "softmax over the inputs",
        "ops/kernel_matrix.py",
        "torch.softmax(K / gamma, -1)",
        "torch.softmax(K / gamma, -2)",
        OPS + "test_kernel_matrix.py",
    ),
    plant(
        "kept at the threshold",
        "ops/kernel_matrix.py",
        "small = size <= tau",
        "small = size < tau",
        OPS + "test_kernel_matrix.py",
    ),
    plant(
        "place of the quantile among n + 1",
        "ops/kernel_matrix.py",
        ".long() * (count - 1)",
        ".long() * count",
        OPS + "test_kernel_matrix.py",
    ),
    plant(
        "gradients of the last block alone",
        "ops/kernel_matrix.py",
        "total += part",
        "total.copy_(part)",
        OPS + "test_kernel_matrix.py",
    ),
    plant(
        "differences twice as wide",
        "ops/dct.py",
        "(index - 1).clamp(min=0)",
        "(index - 2).clamp(min=0)",
        METHODS + "test_loca.py",
    ),
    plant("first cosine too long", "ops/dct.py", "torch.where(i == 0, C / 2**0.5, C)", "C", METHODS + "test_loca.py"),
    plant(
        "gradient of a scale without the other",
        "ops/scaled_basis.py",
        '"...jkc,...jc->...kj", gV, gamma',
        '"...jkc,...jc->...kj", gV, torch.ones_like(gamma)',
        METHODS + "test_randlora.py",
    ),
    plant(
        "lean loss: labels one place further",
        "runtime/lean_loss.py",
        "pad(labels, (0, 1), value=ignore_index)[..., 1:]",
        "pad(labels, (0, 2), value=ignore_index)[..., 2:]",
        LEAN,
    ),
    plant(
        "lean loss: divided by all positions",
        "runtime/lean_loss.py",
        "return total / mask.sum()",
        "return total / mask.numel()",
        LEAN,
    ),
    plant(
        "lean loss: Granite's scaling multiplies",
        "runtime/lean_loss.py",
        "logits / value,  # Granite",
        "logits * value,  # Granite",
        LEAN,
    ),
    plant(
        "lean loss: the soft cap is not scaled back",
        "runtime/lean_loss.py",
        "value * torch.tanh(logits / value)",
        "torch.tanh(logits / value)",
        LEAN,
    ),
    plant(
        "lean loss: the head sees everything",
        "runtime/lean_loss.py",
        "hidden[mask], shift_labels[mask]",
        "hidden[mask | True], shift_labels[mask | True]",
        LEAN,
    ),
    plant(
        "packing: positions go on",
        "tasks/packing.py",
        'row["position_ids"] += range(len(example["input_ids"]))',
        'row["position_ids"] += range(len(row["position_ids"]), len(row["input_ids"]))',
        PACKING,
    ),
    plant(
        "packing: an example's first token is predicted from the one before",
        "tasks/packing.py",
        '[IGNORED, *example["labels"][1:]]',
        'example["labels"]',
        PACKING,
    ),
    plant("packing: with a cache", "tasks/packing.py", '| {"use_cache": False}', '| {"use_cache": True}', PACKING),
    # random bases and codes
    plant(
        "one key for all matrices",
        "ops/random_basis.py",
        "_mixed(number, key[0]",
        "_mixed(0 * number, key[0]",
        OPS + "test_random_basis.py",
    ),
    plant("the sign shifted in", "ops/random_basis.py", "& 0x1FFFF", "& -1", OPS + "test_random_basis.py"),
    plant(
        "chunks start again",
        "ops/random_basis.py",
        "M = uniform(key, first,",
        "M = uniform(key, 0,",
        OPS + "test_random_basis.py",
    ),
    plant(
        "all matrices at once",
        "ops/random_basis.py",
        "return k // chunks if",
        "return k if",
        OPS + "test_random_basis.py",
    ),
    plant(
        "one scale for all vectors",
        "ops/codes.py",
        "c.abs().amax(-1, keepdim=True)",
        "c.abs().amax().expand(*c.shape[:-1], 1)",
        OPS + "test_codes.py",
    ),
    plant("a code too many", "ops/codes.py", "/ (2 ** (bits - 1) - 1)", "/ 2 ** (bits - 1)", OPS + "test_codes.py"),
    plant(
        "scale of the file left out",
        "store/coded.py",
        "tensors.pop(key + SCALE), told",
        "0 * tensors.pop(key + SCALE) + 1, told",
        METHODS + "test_nola.py",
    ),
]
