"""Files -> tensors: images, folder layouts, the split, tiles, textures, training samples."""
