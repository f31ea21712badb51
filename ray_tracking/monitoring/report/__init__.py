"""Reports: a sweep or a run as one page that opens in any browser and asks the network for nothing.

In: what a sweep or run left on its storage. Out: HTML, with plotly's own script in it. `sweep.py` and `run.py` say what
stands on the pages, `figures.py` and its neighbours draw, `page.py` puts together; what comes from users is escaped
there and nowhere else. May import what `monitoring` may, and plotly, Optuna and scikit-learn where they are needed.
"""
