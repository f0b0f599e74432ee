"""What report.py puts on its page, a module a subject.

runs.py reads what runs and evaluations have written, examples.py what they were about. tables.py
and curves.py are drawn here, as HTML and SVG; gallery.py and rollouts.py pack what the page's own
JavaScript draws when it is asked to, with the images of views.py. page.py puts it together.
"""
