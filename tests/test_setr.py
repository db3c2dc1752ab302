"""The SETR-PUP decoder for maps of many sizes."""

from decoder_shapes import parameter_shapes, random_maps

from plan_jax.heads import setr


def test_setr_has_a_block_for_each_doubling():
    decoder = setr.SETR(2, (32, 32), (12, 10, 8, 6))
    for patch, num_blocks in ((16, 4), (8, 3), (4, 2), (1, 0)):
        params, logits = parameter_shapes(decoder, random_maps((32 // patch, 5)))
        assert logits == (2, 32, 32, 2)
        assert sum(name.startswith("conv") for name in params) == num_blocks
        assert params["tokens"]["kernel"].shape == (5, 5)
    for grid in (1, 3):  # of 32 and 10.7 pixels a patch: the remaining factor is resized
        assert parameter_shapes(decoder, random_maps((grid, 5)))[1] == (2, 32, 32, 2)
