python3 -m openrlhf.cli.train_ppo_ray \
   --algo.advantage.estimator rloo --algo.kl.init_coef 1e-2 --rollout.n_samples_per_prompt 4 \
   --rollout.batch_size 32 --train.batch_size 128 --reward.clip_range -1 1 --algo.kl.estimater k1
