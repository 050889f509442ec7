"""Methods that turn requests into weight updates."""

from nmke.editors import alphaedit as alphaedit
from nmke.editors import betaedit as betaedit
from nmke.editors import blue as blue
from nmke.editors import emmet as emmet
from nmke.editors import encore as encore
from nmke.editors import finetune as finetune
from nmke.editors import grace as grace
from nmke.editors import hse as hse
from nmke.editors import ike as ike
from nmke.editors import knowledge_neurons as knowledge_neurons
from nmke.editors import lora as lora
from nmke.editors import memit as memit
from nmke.editors import memoir as memoir
from nmke.editors import nmke as nmke
from nmke.editors import nmke_linear as nmke_linear
from nmke.editors import norm_anchor as norm_anchor
from nmke.editors import nse as nse
from nmke.editors import pmet as pmet
from nmke.editors import prune as prune
from nmke.editors import r_rome as r_rome
from nmke.editors import rect as rect
from nmke.editors import revive as revive
from nmke.editors import rome as rome
from nmke.editors import sphere as sphere
from nmke.editors import ultraedit as ultraedit
from nmke.editors import wise as wise
from nmke.editors.method import Method, Solver, methods
from nmke.editors.stabilisers import stabilisers

__all__ = ["Method", "Solver", "methods", "stabilisers"]
