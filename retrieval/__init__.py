"""Pictures and texts -> embeddings in parquet files -> answers.

sources     what a user names, as a stream of items
pictures    a picture in a file -> RGB, upright, small enough
embedder    a batch of items -> a batch of rows: the model, and all that belongs to it
local       the embedder over a stream of items, on this machine
ray_engine  the same by Ray Data, on many
callables   the same for loops and maps of others: `embed`, `EmbedPictures`
store       rows -> parquet shards that are whole or absent, and what is in them already
search      embeddings of a store -> the nearest of them
"""
