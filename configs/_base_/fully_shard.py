# Every tensor in shards over the GPUs (FSDP2), for backbones that are large beside them. With one GPU nothing is sharded.
# --cfg-options runner_type=Runner trains without shards on many, too; checkpoints are the same either way.
runner_type = 'FlexibleRunner'
strategy = dict(type='FullyShardStrategy')
