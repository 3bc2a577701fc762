"""RankDPO and its relatives: losses on all samples of a prompt at once."""
