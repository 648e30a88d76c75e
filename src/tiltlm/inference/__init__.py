"""Everything that makes draws, weights and losses of a target; engines are one file each."""
