"""Codecs: how a tensor of an optimizer's state is kept between two steps. `stored` puts them around a transform."""
