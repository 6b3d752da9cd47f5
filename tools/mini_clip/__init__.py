"""The recipe of the miniature CLIP: contrastive training on small images, with a teacher.

`python -m mini_clip --out DIR` trains, resumes and exports; it is the only place where a
backbone is trained. Test splits are never read here.
"""

from __future__ import annotations
