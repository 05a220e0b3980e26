"""One vocabulary over model families: the view, the step, selections. Only families/ knows transformers' insides."""
