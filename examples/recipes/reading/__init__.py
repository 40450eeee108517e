"""Data sets as people have them -> rows: `layouts.py` finds the layout by a table, one table a recipe (`labels.py`,
`captions.py`, `depths.py`, `pictures.py`); `cells.py`, `tables.py`, `stored.py` and `tars.py` read what several of them
share.

Every row has the column ROW, how its user knows it (`labels.csv:17`, `cat/1.jpg`, `shard-0.tar/000123`), and may have
PROBLEM: why it cannot be used, where reading found that out.
"""
