"""Losses of a micro-batch, and what they are made of.

The docstring of every objective holds its loss, assembled from its default parts, as lines of torch; a test runs them.
There v, v_old and v_ref are the velocities v(x, t, c) that the policy, the policy before and the reference predict at
states x, times t and conditions c. D are the dimensions of a latent: `.mean(D, True)` leaves a number per state, and
what is a number per sample, edge or time (A, w, t, S, …) has the shape of such a mean. Other names are fields.
"""
