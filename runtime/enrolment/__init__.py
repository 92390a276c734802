"""Enrolment of a new product from a few good images, in numpy: it works on the device, without torch."""
