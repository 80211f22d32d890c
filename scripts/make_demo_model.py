# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
"""Makes the demo model: a small Qwen3 and a byte-level tokenizer, from a seed and nothing else.

The weights are random, so the text means nothing; memory, scheduling and attention behave as they
do with any model. The same arguments give the same files, byte for byte.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

# Beside the model, so that a second run with the same arguments has nothing to do.
RECIPE = "recipe.json"
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, default=Path("build/demo-model"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--intermediate", type=int, default=384)
    parser.add_argument("--heads", type=int, default=8, help="query heads per layer")
    parser.add_argument("--kv-heads", type=int, default=2, help="key-value heads per layer")
    # vLLM's CPU attention has kernels for these sizes only.
    parser.add_argument("--head-dim", type=int, default=32, choices=[32, 64, 128])
    parser.add_argument("--max-positions", type=int, default=32768)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--force", action="store_true", help="make it again if it is there")
    args = parser.parse_args(argv)
    if args.heads % args.kv_heads:
        parser.error(f"--heads {args.heads} is not a multiple of --kv-heads {args.kv_heads}")
    return args


def build_tokenizer(max_positions: int):
    """One token per byte, then the special tokens: any text has tokens, any token has text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=max_positions,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(args: argparse.Namespace, tokenizer):
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        # Rounded up: vLLM pads the vocabulary to a multiple of 64 anyway.
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        max_position_embeddings=args.max_positions,
        # Wider than the usual 0.02, which leaves attention and logits of random weights flat.
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(args.seed)
    model = Qwen3ForCausalLM(config).to(getattr(torch, args.dtype)).eval()
    # The rows that pad the vocabulary have no text: tied and zero, they are never the likeliest.
    with torch.no_grad():
        model.get_input_embeddings().weight[len(tokenizer) :] = 0
    model.generation_config.update(temperature=1.0, do_sample=True)
    return model


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    recipe = {k: v for k, v in vars(args).items() if k not in ("out", "force")}
    stored = args.out / RECIPE
    if not args.force and stored.is_file() and json.loads(stored.read_text()) == recipe:
        # make compares times, so say that the model is as new as this script.
        (args.out / "config.json").touch()
        print(f"{args.out} is up to date")
        return
    if args.out.is_dir() and any(args.out.iterdir()) and not stored.is_file():
        sys.exit(f"{args.out} holds something that this script did not make; name another folder")
    shutil.rmtree(args.out, ignore_errors=True)

    tokenizer = build_tokenizer(args.max_positions)
    model = build_model(args, tokenizer)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    stored.write_text(json.dumps(recipe, indent=2) + "\n")
    count = sum(p.numel() for p in model.parameters())
    print(f"{args.out}: {count / 1e6:.2f} M parameters, {args.dtype}, seed {args.seed}")


if __name__ == "__main__":
    main()
