"""The remote tier: blocks in a bucket or a mounted directory that several machines share.

`tier` holds `RemoteTier`. `stores` reaches the storage, `signatures` signs what is stored there, `manifest` and
`manifest_log` exchange lists of blocks between machines, `block_list` keeps the list of one machine, `uploads`
writes in the background, and `health` decides whether a read is worth its wait. Imports `tiers` and `blocks`.
"""
