"""Megatron's two checkpoint formats, a writer and a reader each, and the files that both are made of.

torch_dist_writer.py  the `torch_dist` format, which loads at every layout: which byte of which file a parameter gets
torch_dist_reader.py  the same format: the blocks of every parameter in a folder, of whatever program saved it
rank_files_writer.py  the `torch` format, one file a rank for one layout: which byte of which file a parameter gets
rank_files_reader.py  the same format: the blocks of every parameter in the files of all ranks
torch_save_file.py    a torch.save file: where its tensors are, and the bytes of one before its tensors are there
safe_pickle.py        reads pickles without importing or calling anything that they name
"""
