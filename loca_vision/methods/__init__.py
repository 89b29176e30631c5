"""The methods of the library, in the order in which users see them."""

# isort: off
from loca_vision.methods import loca as loca
from loca_vision.methods import sdctft as sdctft
from loca_vision.methods import fourierft as fourierft
from loca_vision.methods import lora as lora
from loca_vision.methods import selora as selora
from loca_vision.methods import waveft as waveft
from loca_vision.methods import shira as shira
# isort: on
