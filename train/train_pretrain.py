"""Pretrain a model on text: `python train_pretrain.py --data my_text.jsonl`. Run again, it goes on where it stopped."""

from etude import cli
from etude.training.config import PretrainConfig


def main() -> None:
    config = cli.parse(PretrainConfig, __doc__)
    from etude.data.batches import Batches
    from etude.data.pretrain import PretrainBlocks, prepare_pretrain
    from etude.losses import causal_lm_loss
    from etude.training.plan import print_plan
    from etude.training.start import continuation_sample, pretraining_model, pretraining_tokenizer, weights_fingerprint
    from etude.training.trainer import Trainer

    tokenizer = pretraining_tokenizer(config)
    model = pretraining_model(config, tokenizer)  # first: what it refuses should not be heard after an hour of tokenising
    train, val = prepare_pretrain(
        config.data, tokenizer, config.token_cache, config.val_data, config.val_fraction, config.seed,
        config.text_key, config.text_unit, config.max_bad, config.workers,
    )  # fmt: skip
    blocks, val_blocks = (
        PretrainBlocks(store, config.block_size, tokenizer.pad_id, config.separate_documents) for store in (train, val)
    )
    trainer = Trainer(
        config, model, tokenizer,
        batches=Batches(blocks, config.batch_size, config.seed),
        loss=causal_lm_loss,
        val=val_blocks,
        sample=continuation_sample(tokenizer, config.sample_prompt, val),
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
