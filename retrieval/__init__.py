"""Pictures and texts -> embeddings in parquet files -> answers.

sources     what a user names, as a stream of items
pictures    a picture in a file -> RGB, upright, small enough; `load_picture` for anybody
embedder    a batch of items -> a batch of rows: the model, and all that belongs to it
local       the embedder over a stream of items, on this machine
ray_engine  the same by Ray Data, on many
callables   the same for loops and maps of others: `embed`, `EmbedPictures`
run         a source, an embedder and a store: a run that can be killed and goes on
store       rows -> parquet shards that are whole or absent, and what is in them already
search      embeddings of a store -> the nearest of them
fonts       fonts that have the letters of a caption
sheet       pictures with captions on one sheet
views       what the page answers, without a browser; colours of its maps, page its parts
*_command   command lines of embed_images.py, search.py and app.py
"""
