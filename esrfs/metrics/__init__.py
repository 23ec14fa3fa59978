"""How like a view is to its original: SSIMULACRA2, the gate's metric, and PSNR beside it."""
