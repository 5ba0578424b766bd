"""Teach a model to chat: `python train_sft.py --data my_chats.jsonl`. Run again, it goes on where it stopped."""

from etude import cli
from etude.training.config import SFTConfig


def main() -> None:
    config = cli.parse(SFTConfig, __doc__)
    from etude.data.batches import Batches
    from etude.data.sft import SFTRows, prepare_sft
    from etude.losses import causal_lm_loss
    from etude.training.plan import print_plan
    from etude.training.start import reply_sample, starting_model, weights_fingerprint
    from etude.training.trainer import Trainer

    model, tokenizer = starting_model(config, before="python train/train_pretrain.py")
    train, val = prepare_sft(
        config.data, tokenizer, config.token_cache, config.block_size, config.val_data, config.val_fraction,
        config.seed, config.max_bad,
    )  # fmt: skip
    rows, val_rows = (SFTRows(store, config.block_size, tokenizer.pad_id) for store in (train, val))
    print(f"packing   {len(rows):,} rows of {config.block_size}, {rows.filled:.1%} filled")
    trainer = Trainer(
        config, model, tokenizer,
        batches=Batches(rows, config.batch_size, config.seed),
        loss=causal_lm_loss,
        val=val_rows,
        sample=reply_sample(tokenizer, config.sample_prompt, val),
        fingerprints={
            "data": train.info["content_sha256"],
            "val_data": val.info["content_sha256"],
            "tokenizer": tokenizer.fingerprint,
            "init_from": weights_fingerprint(config.init_from),
        },
    )  # fmt: skip
    print_plan(trainer) if config.plan else trainer.run()


if __name__ == "__main__":
    cli.run(main)
