"""OPSD, on-policy self-distillation (arXiv 2601.18734 v1, Eq. (6)), a baseline of the paper's
Table 1: train_grpo.py with a teacher in place of advantages.

    python -m baselines.train_opsd --model toy/sums_model --data hard.jsonl --out out/opsd
    torchrun --nproc-per-node 8 -m baselines.train_opsd --model Qwen/Qwen2.5-1.5B-Instruct \\
        --data out/rollouts/zero_hit.jsonl --out out/opsd

Read it beside train_grpo.py: how to write a baseline. Data, sampling, checkpoints and logs are
imported; what is here is what differs:
    add_teacher_prompts, response_divergence     new
    update                                       the divergence takes the place of policy_loss
    main                                         a teacher; no advantages, no rescue

Each step: sample a response per prompt (--group-size 1, its Sec. 4.1), and move the policy's
distribution at every response token toward that of the teacher: the initial model, fixed, that
reads the same prompt, --hint with the gold answer after it (the paper: a solution), and the same
response. Rewards are logged only.

Loss of a token: JSD_beta(teacher || student) over the whole vocabulary (GKD, arXiv 2306.13649), at
beta 0.5 as in v1; v3 has beta 0 and --clip 0.05. Mean over all response tokens of the step, as
OPSD's code has it; its Eq. (6) averages each response first. Its paper trains LoRA with warm-up and
cosine; here AdamW trains all weights at a constant rate, as in Table 7.
"""
import argparse
import math
import time
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import revise
import rollout
import train_grpo
from baselines.hint import HINT, hint_text, with_hint
from helpers import common, training, verifying
from helpers.common import NOT_NEGATIVE, Policy, UserError, checked

# Dimension key: M response tokens of a micro-batch, V vocabulary, D model width


def add_teacher_prompts(policy: Policy, problems: list[dict], args: argparse.Namespace) -> None:
    """Give each problem its `teacher_ids`, the prompt that tells the gold answer, and leave room
    for them in its `limit`. Raises UserError."""
    for p in problems:
        hinted = with_hint(p, revise.guide_of(p), args)
        p["teacher_ids"] = rollout.prompt_ids(policy.tokenizer, hinted, args)
        room = policy.context - len(p["teacher_ids"])
        if room <= 0:
            raise UserError(f"--hint: with it problem {p['id']!r} is {len(p['teacher_ids'])} "
                            f"tokens long, and the context of --model holds {policy.context}")
        p["response_limit"] = int(min(p["response_limit"], room))


def head_divergence(head, hidden: Tensor, teacher_head, teacher_hidden: Tensor, beta: float,
                    clip: float) -> tuple[Tensor, Tensor]:
    """JSD_beta(teacher || student) of the next-token distributions and the student's entropy, (M,)
    each, from hidden (M, D).

    beta KL(P || M) + (1 - beta) KL(Q || M) with P the teacher, Q the student and
    M = beta P + (1 - beta) Q: GKD. As there, beta 0 and 1 stand for the limits KL(P || Q) and
    KL(Q || P), not for the 0 of the formula. clip: largest term of one vocabulary entry (OPSD v3);
    0 is off. The gradient is the student's alone.
    """
    q = F.log_softmax(head(hidden).float(), -1)  # (M, V)
    with torch.no_grad():
        p = F.log_softmax(teacher_head(teacher_hidden).float(), -1)  # (M, V)
    if beta == 0:
        terms = p.exp() * (p - q)
    elif beta == 1:
        terms = q.exp() * (q - p)
    else:
        mixture = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
        terms = beta * p.exp() * (p - mixture) + (1 - beta) * q.exp() * (q - mixture)
    if clip:
        terms = terms.clamp(max=clip)
    return terms.sum(-1), -(q.detach().exp() * q.detach()).sum(-1)


@training.as_forward
def response_divergence(model, teacher, rows: list[dict], beta: float, clip: float,
                        head_rows: int = training.HEAD_ROWS) -> tuple[Tensor, Tensor]:
    """head_divergence at every response token of the rows, (M,) with gradient in `model`; the
    model's entropies (M,). The teacher reads the same responses after `teacher_ids`. Chunked as in
    training.response_logprobs."""
    with torch.no_grad():
        teacher_pass = training.as_forward(training.response_hidden)
        wanted = teacher_pass(teacher, rows, "teacher_ids")[0]  # (M, D)
    hidden = training.response_hidden(model, rows)[0]  # (M, D)
    head, teacher_head = model.get_output_embeddings(), teacher.get_output_embeddings()
    parts = [checkpoint(head_divergence, head, hidden[s:s + head_rows], teacher_head,
                        wanted[s:s + head_rows], beta, clip, use_reentrant=False)
             for s in range(0, max(len(hidden), 1), head_rows)]
    divergence, entropies = zip(*parts)
    return torch.cat(divergence), torch.cat(entropies)


def update(model, teacher, optimizer, rows: list[dict], args: argparse.Namespace) -> dict:
    """One optimizer step. Returns means over response tokens."""
    # of all processes, before the first forward
    tokens = training.total(sum(len(r["response_ids"]) for r in rows))
    sums = Counter()
    for batch in training.equal_batches(rows, args.train_tokens):
        with common.checkpointed(model, args.checkpoint_activations):
            loss, entropy = response_divergence(model, teacher, batch, args.beta, args.clip)
            (loss.sum() / tokens).backward()  # denominator: response tokens of the step
        sums.update(loss=float(loss.detach().sum()), entropy=float(entropy.sum()))
    norm = training.apply_gradients(model, optimizer, args.grad_clip)
    means = {name: training.total(v) / tokens for name, v in sums.items()}
    return means | {"grad_norm": norm, "tokens": tokens}


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.Parser(__doc__, prog="python -m baselines.train_opsd")
    train_grpo.add_common_args(parser, group_size=1)
    flag = parser.add_argument_group("distillation").add_argument
    flag("--beta", type=checked(float, lambda x: 0 <= x <= 1), default=0.5, help="of JSD_beta")
    flag("--clip", type=NOT_NEGATIVE, default=0.0,
         help="largest term of a vocabulary entry; 0 is off")
    flag("--hint", type=hint_text, default=HINT, help="what the teacher reads after the problem")
    parser.set_defaults(algo="opsd", revise=False)  # what collect() asks
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    training.check_plain_sampling(args)

    # === setup ===
    problems = rollout.read_problems(args.data, args)
    device = common.pick_device(args)
    out = common.start_run(args.out, args, data_digest=common.file_digest(args.data))
    if training.is_finished(out, args.steps):
        return
    verify = verifying.from_args(args)
    trained = training.load_model(args, device, train=True)
    model, tokenizer = trained.model, trained.tokenizer
    problems = rollout.add_prompts(trained, problems, args)
    add_teacher_prompts(trained, problems, args)
    teacher_ids = {p["id"]: p["teacher_ids"] for p in problems}
    teacher = training.load_model(args, device).model  # the initial model, also after a restart
    policy = trained._replace(model=training.load_actor(model, args, device))
    optimizer = training.make_optimizer(model, args)
    state = {"cursor": 0} | training.load_checkpoint(out, model, optimizer, args.steps)
    log = training.open_logs(out, args, state["step"])

    for step in training.step_bar("opsd", state["step"], args.steps):
        # === collect: sample and verify ===
        training.refresh_actor(policy.model, model)
        groups, state["cursor"], counts = train_grpo.collect(policy, problems, step,
                                                             state["cursor"], args, verify)
        rows = [r | {"teacher_ids": teacher_ids[r["id"]]} for group in groups for r in group]

        # === update ===
        begun = time.time()
        stats = update(model, teacher, optimizer, rows, args)
        seconds = round(time.time() - begun, 3)

        # === report ===
        log(train_grpo.step_metrics(step, counts, rows, stats) | {
            "lr": args.lr, "memory_gb": training.peak_memory(device), "seconds_update": seconds})
        train_grpo.log_samples(out, step, rows, tokenizer, args)
        state["step"] = step
        if args.save_every and step % args.save_every == 0 and step < args.steps:
            training.save_checkpoint(out, trained, optimizer, state, args.keep)
    training.finish(out, trained, args.steps)


if __name__ == "__main__":
    common.run_script(get_args, main)
